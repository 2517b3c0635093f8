"""Files of rows that cannot be read, or could be read in two ways: refused with file and line, or read right."""

import json
import os

import pytest

from src.config.schema import Dataset, HubTable, Point
from src.data.evaluation_prompts import EvaluationPrompt, read_answers
from src.data.rows import Prompt, parse_demonstration, parse_pair, read_rows, text_prompt
from src.data.sources import JsonLines
from src.data.tables import Hub
from src.data.templates import Template
from src.data.tokenization import tokenize
from src.errors import ConfigError
from src.planning.inputs import pair_data, sft_data
from tests.support import tiny_llama
from tests.support.commands import run_in_process

GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


def jsonl(path, **sizes) -> JsonLines:
    return JsonLines(pair_data(Point(dataset=Dataset("d", "jsonl", str(path), **sizes))))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": [{"role": ["user"], "content": "a"}], "chosen": "b", "rejected": "c"}', "a message needs role"),
        ('{"prompt": [{"role": {}, "content": "a"}], "chosen": "b", "rejected": "c"}', "a message needs role"),
        ('{"prompt": [], "chosen": "b", "rejected": "c"}', "the conversation before the response has no message"),
        ('{"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}', "before the response has no message"),
        (r'{"prompt": "a \ud83d", "chosen": "b", "rejected": "c"}', r"a lone half of a surrogate pair, \ud83d"),
        (r'{"prompt": "a", "chosen": "\uDE00\uD83D", "rejected": "c"}', r"a lone half of a surrogate pair, \ude00"),
        ('{"prompt": ' + "1" * 5000 + ', "chosen": "b", "rejected": "c"}', "cannot be read: Exceeds the limit"),
        ('{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "prompt": "d"}', "an object has the key 'prompt' twice"),
        ('{"prompt": [{"role": "user", "role": "system", "content": "a"}], "chosen": "b"}', "the key 'role' twice"),
        ('{"prompt": "a\0", "chosen": "b", "rejected": "c"}', "not JSON (Invalid control character at)"),
        ("\0" * 40, "not JSON (Expecting value)"),
        ('{"prompt": "a", "chosen": "b"}', "missing field 'rejected'"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "chosen must be text"),
        ('{"conversations": 7, "chosen": "b", "rejected": "c"}', "a conversation is a list"),
        ("1", "a row is an object"),
        ("\ufeff" + GOOD, "not JSON (Unexpected UTF-8 BOM"),  # in the middle of a file
    ],
)
@pytest.mark.parametrize("layout", ["lines", "list"])
def test_a_row_that_cannot_be_read_is_one_line_with_file_and_line(line, message, layout, tmp_path):
    path = tmp_path / "pairs.json"
    text = f"{GOOD}\n{GOOD}\n{line}\n" if layout == "lines" else f"[{GOOD},\n{GOOD},\n{line}\n]"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        jsonl(path, validation_size=2).pairs("train")
    shown = str(error.value)
    if layout == "list" and "BOM" in message:
        message = "not JSON"
    assert message in shown and shown.startswith(f"{path}, ") and "\n" not in shown and len(shown) < 300
    assert layout == "list" or shown.startswith(f"{path}, line 3: ")


def test_a_file_without_rows_and_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for content, message in (
        (b"", "the file has no rows"),
        (GOOD.encode() + b'\n{"prompt": "\xff"}', "line 2: not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{path}.* {message}"):
            jsonl(path, validation_size=1).pairs("train")


@pytest.mark.parametrize(
    "line",
    [
        '{"conversations": null, "prompt": "a", "chosen": "b", "rejected": "c"}',
        '{"conversations": [{"from": "human", "role": null, "value": "a", "content": null}],'
        ' "prompt": null, "chosen": "b", "rejected": "c"}',
    ],
)
def test_null_fields_beside_others_are_fields_that_are_not_there(line):
    pair = parse_pair(json.loads(line), "here")
    assert (pair.prompt, pair.chosen, pair.rejected) == (text_prompt("a"), "b", "c")


def test_null_fields_of_demonstrations_are_not_there_either():
    nothing = {"chosen": None, "messages": None, "conversations": None, "completion": None}
    assert parse_demonstration(nothing | {"prompt": "a", "response": "b"}, "here").response == "b"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert parse_demonstration(nothing | {"messages": turns, "prompt": None}, "here").response == "b"
    with pytest.raises(ConfigError, match="here: needs messages, or prompt and completion"):
        parse_demonstration(nothing | {"prompt": "a"}, "here")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_line_ends_and_any_character_are_read(start, end, tmp_path):
    texts = [
        "p\u2028q",
        "\U0001f600 $x$ <script>alert(1)</script>",
        "nul \0 inside",
        "x " * 50_000,
        "\x85\x0c\x0b",
        "e",
    ]
    rows = [{"prompt": text, "chosen": text + "b", "rejected": "c"} for text in texts]
    for ascii_only in (True, False):
        lines = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        (tmp_path / "pairs.jsonl").write_bytes((start + lines).encode())
        read = read_rows(str(tmp_path / "pairs.jsonl"))
        assert [row for _, row in read] == rows
        assert [where.rpartition(" ")[2] for where, _ in read] == [str(n) for n in range(1, 7)]
    (tmp_path / "pairs.jsonl").write_bytes((start + json.dumps(rows, indent=1)).encode())
    assert [row for _, row in read_rows(str(tmp_path / "pairs.jsonl"))] == rows


def test_a_prompt_of_100_000_characters_is_cut_to_its_end():
    template = Template("llama3", tiny_llama.tokenizer())
    prompt = "\u2028\U0001f600 $ <script> <|eot_id|> " * 4000
    (example,) = tokenize(
        [parse_pair({"prompt": prompt, "chosen": "b", "rejected": "c"}, "")], template, 200, 90
    ).examples
    assert len(example.prompt) == 90 and list(example.prompt) == template.prompt_ids(text_prompt(prompt))[-90:]
    assert example.prompt.count(template.end_id) == 1  # the template's


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_file_of_rows_is_a_regular_file(kind, tmp_path):
    path = tmp_path / "pairs.jsonl"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    for key in ("dataset.path", "evaluation.prompts_file", "judge.baseline"):
        with pytest.raises(ConfigError, match=f"^{key}={path}: not a regular file"):
            read_rows(str(path), key)


def tables(folder, train=GOOD, validation=GOOD):
    for name in ("sft", "preference"):
        (folder / name).mkdir()
        for split, text in (("train", train), ("validation", validation)):
            (folder / name / f"{split}.jsonl").write_text(text)
    table = HubTable("x/y")
    return Point(dataset=Dataset("d", "hub", str(folder), sft=table, preference=table))


def test_a_fifo_in_a_local_table_is_refused_and_not_waited_for(tmp_path):
    point = tables(tmp_path)
    Hub(pair_data(point)).check()
    os.mkfifo(tmp_path / "preference" / "train-2.jsonl")
    with pytest.raises(ConfigError, match=r"^dataset.path=.*train-2.jsonl: not a regular file"):
        Hub(pair_data(point)).check()


def test_an_empty_split_of_a_local_table_is_named(tmp_path):
    import pandas as pd

    point = tables(tmp_path)
    for write, folder in (("parquet", "preference"), ("jsonl", "sft")):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
        full, empty = pd.DataFrame([json.loads(GOOD)]), pd.DataFrame()
        if write == "parquet":
            full.to_parquet(tmp_path / folder / "train.parquet")
            empty.to_parquet(tmp_path / folder / "validation.parquet")
        else:
            (tmp_path / folder / "train.jsonl").write_text("")
        data = pair_data(point) if folder == "preference" else sft_data(point)
        with pytest.raises(ConfigError, match=rf"{tmp_path}/{folder}") as error:
            Hub(data).check()
        assert "\n" not in str(error.value) and "no rows" in str(error.value)
    (tmp_path / "sft" / "train.jsonl").write_text(GOOD)
    full.iloc[:0].to_parquet(tmp_path / "preference" / "validation.parquet")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/preference"):
        Hub(pair_data(point)).check()


def test_two_different_answers_to_one_prompt_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    prompts = [EvaluationPrompt("q", text_prompt("q"))]
    row = {"instruction": "q", "output": "a"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    assert read_answers(str(path), prompts, "judge.baseline")[0]["response"] == "a"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'output': 'b'})}\n")
    with pytest.raises(ConfigError, match=r"line 2: a second, other answer to 'q'"):
        read_answers(str(path), prompts, "judge.baseline")


@pytest.mark.parametrize("sweep", [[], ["-m", "beta=0.1,1"]], ids=["run", "sweep"])
def test_a_bad_row_is_exit_code_2_in_one_line_through_the_command(sweep, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}}\n')
    options = ("judge=none", "evaluation=preference", f"output_dir={tmp_path / 'out'}")
    done = run_in_process(*sweep, "dataset=jsonl", f"dataset.path={path}", *options)
    assert not (tmp_path / "out" / "store").exists()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and f"{path}, line 2: a lone half" in done.stderr


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "tool", "content": "4"}]}, r"role 'tool': conversations with tools are not supported"),
        ({"messages": [{"from": "function_call", "value": "{}"}]}, "role 'function_call': .* with tools"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "field 'tool_calls': .* with tools",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]},
            "field 'reasoning_content': .* with thinking",
        ),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "column 'tools': .* with tools"),
        ({"messages": [{"role": "thinking", "content": "a"}]}, "role 'thinking': .* with thinking"),
    ],
)
def test_tools_and_thoughts_in_a_row_are_refused_by_name(row, reason):
    with pytest.raises(ConfigError, match=rf"^t.jsonl, line 3: {reason}"):
        parse_demonstration(row, "t.jsonl, line 3")


def test_columns_for_tools_that_hold_nothing_are_those_of_an_ordinary_conversation():
    """Tables of mixed layouts have them in every row."""
    fields = {"tool_calls": None, "thinking": None, "reasoning_content": ""}
    messages = [{"role": r, "content": r, **fields} for r in ("user", "assistant")]
    for nothing in (None, [], "", "[]"):
        row = {"messages": messages, "tools": nothing, "thinking": "a column of the table's own"}
        assert parse_demonstration(row, "here").response == "assistant"


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{{ raise_exception('no thanks') }}", "TemplateError: no thanks"),
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError: "),
        ("{{ messages[5].content }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ],
)
def test_a_chat_template_that_does_not_work_is_refused_when_it_is_loaded(chat_template, reason):
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(ConfigError, match=r"^model\.template=tokenizer: the chat template .* mend that of model\.path"):
        Template("tokenizer", tokenizer)
    with pytest.raises(ConfigError, match=reason):
        Template("tokenizer", tokenizer)
    assert Template("llama3", tokenizer).prompt_ids(text_prompt("a"))


def test_messages_that_a_chat_template_refuses_are_named_by_row():
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    template = Template("tokenizer", tokenizer)
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    pair = parse_pair({"prompt": rows, "chosen": "a", "rejected": "b"}, "pairs.jsonl, line 9")
    with pytest.raises(ConfigError, match=r"^pairs.jsonl, line 9: .* roles system, user: .*System role not supported"):
        tokenize([pair], template, 99, 50)
    assert template.prompt_ids(Prompt(pair.prompt.messages[1:]))
