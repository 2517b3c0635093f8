"""ChatML, template files and end tokens: of base models whose tokenizers end a text otherwise than a chat an answer."""

import json

import pytest

from src.config.schema import Model
from src.config.template_rules import check_template
from src.config.validation import build_point
from src.data.rows import Prompt, text_prompt
from src.data.templates import Template, read_template
from src.data.tokenization import tokenize
from src.errors import ConfigError
from src.model.sampling import sample
from src.planning.stage import stages_of
from src.preflight import check_input_files
from tests.support import tiny_qwen
from tests.support.commands import train
from tests.support.configs import composed, point
from tests.support.conversations import TURNS, conversation
from tests.support.small_models import make_model, smollm2_template

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi\n"}
END = "<|im_end|>"


@pytest.mark.parametrize("tokenizer", ["qwen", "smollm2"])
def test_chatml_is_the_models_own_template_without_the_system_message_that_it_adds(tokenizer):
    own = smollm2_template() if tokenizer == "smollm2" else Template("tokenizer", tiny_qwen.tokenizer(), (END,))
    chatml = Template("chatml", own.tokenizer)
    given, without = Prompt((SYSTEM, USER)), Prompt((USER,))
    assert chatml.prompt_ids(given) == own.prompt_ids(given)
    text = "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n"
    assert own.tokenizer.decode(chatml.prompt_ids(without)) == text
    assert own.prompt_ids(without) != chatml.prompt_ids(without), "the control: a system message"
    assert chatml.end_ids == own.end_ids and own.tokenizer.convert_ids_to_tokens(chatml.end_id) == END
    ids = chatml.response_ids("Hello<|im_end|>")
    assert ids[-1] == chatml.end_id and ids.count(chatml.end_id) == 1, "what a text spells is text"
    assert chatml.text(ids) == "Hello<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_system_prompt_begins_every_conversation_that_has_none(name):
    given, without, tokenizer = Prompt((SYSTEM, USER)), Prompt((USER,)), tiny_qwen.tokenizer()
    plain, with_prompt = Template(name, tokenizer), Template(name, tokenizer, system_prompt=SYSTEM["content"])
    assert with_prompt.prompt_ids(without) == plain.prompt_ids(given) != plain.prompt_ids(without)
    assert with_prompt.prompt_ids(given) == plain.prompt_ids(given)
    rows = [conversation(("Be brief.", *TURNS), ("system",)), conversation(TURNS)]
    learned = [tokenize([row], t, 1000, 500).examples[0] for row, t in zip(rows, (plain, with_prompt), strict=True)]
    assert learned[0] == learned[1]


def test_a_template_that_writes_no_system_prompt_is_refused_when_it_is_loaded():
    own = tiny_qwen.tokenizer()
    own.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    Template("tokenizer", own, (END,))
    with pytest.raises(ConfigError, match="cannot write messages of the roles system, user"):
        Template("tokenizer", own, (END,), "Be brief.")


def test_a_template_that_leaves_out_system_prompts_is_refused_and_one_that_has_the_same_by_itself_is_not():
    own, default = tiny_qwen.tokenizer(), "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    with_default = Template("tokenizer", own, (END,), default)
    assert with_default.prompt_ids(Prompt((USER,))) == Template("tokenizer", own, (END,)).prompt_ids(Prompt((USER,)))
    own.chat_template = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    Template("tokenizer", own, (END,))
    with pytest.raises(ConfigError, match=r"model\.template=tokenizer leaves out messages of the system"):
        Template("tokenizer", own, (END,), "Be brief.")


def test_a_base_model_learns_conversations_with_chatml_or_the_end_token_that_its_template_writes():
    tokenizer, row = tiny_qwen.tokenizer(), conversation(("Be brief.", *TURNS), ("system",))
    with pytest.raises(ConfigError, match=r"ends an answer without <\|endoftext\|>.* set model.end_token to the token"):
        tokenize([row], Template("tokenizer", tokenizer), 1000, 500)
    own, chatml = Template("tokenizer", tokenizer, (END,)), Template("chatml", tokenizer)
    examples = tokenize([row], own, 1000, 500).examples
    assert examples[:] == tokenize([row], chatml, 1000, 500).examples[:]
    assert sum(examples[0].responses[0].count(i) for i in own.end_ids) == 5, "of three answers and two user turns"


def test_any_of_several_end_tokens_ends_a_sample_and_the_first_is_learned():
    both = Template("chatml", tiny_qwen.tokenizer(), (END, "<|endoftext|>"))
    assert both.response_ids("a")[-1] == both.end_id == both.tokenizer.convert_tokens_to_ids(END)
    other = both.end_ids[1]
    assert both.response_ids("a", other)[-1] == other and both.text([*both.response_ids("a")[:-1], other]) == "a"
    model = make_model(vocab_size=len(both.tokenizer), initializer_range=0.02)
    prompts = [[3, 4, 5 + i] for i in range(24)]
    generation = point("evaluation.generation.max_new_tokens=200").evaluation.generation

    def draw(template):
        return {i: (ids, finished) for i, ids, finished in sample(model, template, prompts, "s", generation)}

    one, two = draw(Template("chatml", both.tokenizer)), draw(both)
    assert any(other in ids for ids, _ in one.values()), "the control"
    for i, (ids, _) in one.items():
        end = ids.index(other) + 1 if other in ids else len(ids)
        assert two[i] == (ids[:end], ids[end - 1] in both.end_ids)
    assert {two[i][0][-1] for i in two if two[i][1]} == {*both.end_ids}


def test_a_template_file_counts_by_its_content(tmp_path):
    def identities(*overrides):
        return [s.identity for s in stages_of(build_point(composed("model.template=tokenizer", *overrides)))]

    first, second = tmp_path / "a.jinja", tmp_path / "b.jinja"
    first.write_text(tiny_qwen.CHAT_TEMPLATE)
    second.write_text(tiny_qwen.CHAT_TEMPLATE)
    of_file = identities(f"model.template={first}")
    assert of_file == identities(f"model.template={second}") != identities()
    second.write_text(tiny_qwen.CHAT_TEMPLATE + "\n")
    assert not {*of_file} & {*identities(f"model.template={second}")}
    assert identities("model.end_token=null") == identities()
    ends = [identities(f"model.end_token={value}") for value in ("a", "[a]", "[a,b]", "[b,a]")]
    assert ends[0] == ends[1] and len({ids[0] for ids in (identities(), *ends)}) == 4
    # What is written with it is what the same template of a tokenizer writes.
    tokenizer = tiny_qwen.tokenizer()
    assert Template(str(first), tokenizer).prompt_ids(text_prompt("Hi")) == Template("tokenizer", tokenizer).prompt_ids(
        text_prompt("Hi")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{{ 1 }}\n{% for m in messages %}\n{{ m.content }}", r"line 3: .*endfor"),
        (b"\xff", "not UTF-8"),
        (b" \n", "the file is empty"),
        (b"{% generation %}{{ messages[0].content }}{% endgeneration %}{% break %}", None),
    ],
)
def test_a_template_file_with_wrong_syntax_is_refused_before_anything_runs(content, reason, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_bytes(content)
    if reason is None:  # the tags that transformers adds
        assert read_template(str(file)) == content.decode()
        return
    with pytest.raises(ConfigError, match=rf"model\.template={file}.*{reason}"):
        check_input_files([point(f"model.template={file}")])


def test_tokens_that_a_local_tokenizer_does_not_have_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.template=chatml: this tokenizer has no <\|im_start\|>"):
        check_input_files([point("model.template=chatml")])
    with pytest.raises(ConfigError, match=r"model\.end_token: this tokenizer has no <nosuch>"):
        check_input_files([point("model.end_token=['<s>', '<nosuch>']")])
    folder = tiny_qwen.model(tmp_path / "model")
    check_input_files([point("model=hf", f"model.path={folder}", "model.template=chatml", f"model.end_token='{END}'")])


@pytest.mark.parametrize("value", [[], [""], ["a", "a"], 3, {"a": "b"}, ["a", 3]])
def test_what_is_no_token_or_list_of_tokens_is_refused(value):
    with pytest.raises(ConfigError, match=r"^model\.end_token="):
        check_template(Model("m", "p", end_token=value))


@pytest.mark.slow
def test_any_folder_with_a_config_runs_and_learns_conversations_with_chatml(tmp_path):
    """The whole way with model=hf; and the same with the tokenizer's own template, which is refused by name."""
    settings = [
        *("model=hf", f"model.path={tiny_qwen.model(tmp_path / 'model')}", "judge=none", "evaluation=preference"),
        *("dataset=jsonl", f"dataset.path={tiny_qwen.conversations(tmp_path / 'pairs.jsonl')}", "beta=0.1", "lr=1e-3"),
        *("dataset.validation_size=4", "dataset.max_tokens=120", "dataset.max_prompt_tokens=80", "trainer.sft.lr=1e-3"),
        *("evaluation.generation.max_new_tokens=8", "trainer.sft.max_steps=2", "trainer.align.max_steps=2"),
        *("trainer.sft.batch_size=4", "trainer.align.batch_size=4", f"output_dir={tmp_path / 'out'}"),
    ]
    refused = train(*settings, check=False)
    assert refused.returncode and "set model.end_token to the token" in refused.stderr
    train(*settings, "model.template=chatml")
    (sft,) = (tmp_path / "out").glob("store/sft/*/stage.json")
    assert json.loads(sft.read_text())["inputs"]["model"]["template"] == "chatml"
