"""Files of a judge's prompt: Arena-Hard's judge_config.yaml, and annotators of alpaca-eval."""

import os

import pytest

from src.config.judge import Judge
from src.config.schema import Point
from src.errors import ConfigError
from src.judges.prompt_file import load_judge_prompt
from src.preflight import check_packages
from tests.support.commands import run_in_process


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"system_prompt: x",
        b"\x00\xff\xfe",
        b"[" * 500,
        b'{"system_prompt": 7, "prompt_template": ["{question_1} {answer_1} {answer_2}"]}',
        b'{"system_prompt": "", "prompt_template": "{question_1} {answer_1} {answer_2}"}',
        b'{"system_prompt": "", "prompt_template": [["{question_1} {answer_1} {answer_2}"]]}',
        b'{"system_prompt": "", "prompt_template": ["{question_1} {answer_1}"]}',
        b'{"system_prompt": "", "prompt_template": ["{question_1} {answer_1} {answer_2} {"]}',
        b'{"system_prompt": "", "prompt_template": ["{question_1} {answer_1} {answer_2.__class__}"]}',
        b'{"system_prompt": "", "prompt_template": ["{question_1} {answer_1} {answer_2:>9999999999}"]}',
        b'{"system_prompt": "\\ud83d", "prompt_template": ["{question_1} {answer_1} {answer_2}"]}',
    ],
)
def test_a_prompt_file_of_another_format_is_one_line_that_names_it(content, tmp_path):
    file = tmp_path / "judge_config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^judge.prompt_file={file}: needs system_prompt") as refused:
        load_judge_prompt(str(file))
    assert "\n" not in str(refused.value)
    file.write_bytes(b'{"system_prompt": "be fair", "prompt_template": ["{question_1} {answer_1} {answer_2} {{}}"]}')
    assert load_judge_prompt(str(file)) == ("be fair", "{question_1} {answer_1} {answer_2} {{}}")


def test_a_prompt_file_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    options = ["judge=arena_hard", "judge.baseline=sft", f"judge.prompt_file={tmp_path}/pipe.yaml"]
    done = run_in_process(*options, f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and f"judge.prompt_file={tmp_path}/pipe.yaml: no such file" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its configs.yaml needs NAME"),
        (b"\xff\x00", "its configs.yaml needs NAME"),
        (b"mine: [1]", "its configs.yaml needs NAME"),
        (b"mine: {prompt_template: 7}", "its configs.yaml needs NAME"),
        (b"mine: {prompt_template: mine/nowhere.txt}", "is no file in this folder"),
        (b"mine: {prompt_template: other/prompt.txt}", "is no file in this folder"),
        (b"mine: {prompt_template: mine/../other/prompt.txt}", "is no file in this folder"),
        (b"mine: {prompt_template: mine/prompt.txt}", None),
        (b"mine: {prompt_template: 'Which of {output_1} and {output_2}?'}", None),
    ],
)
def test_an_annotator_is_readable_and_all_of_it_is_in_its_folder(content, message, tmp_path):
    """Its identity is that of the folder's content: an edited prompt elsewhere would not be noticed."""
    point = Point(judge=Judge(name="alpaca_eval", model=str(tmp_path / "mine")))
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompt.txt").write_text("Which?")
    (tmp_path / "mine" / "configs.yaml").write_bytes(content)
    if message is None:
        check_packages([point])
        return
    with pytest.raises(ConfigError, match=message) as refused:
        check_packages([point])
    assert str(refused.value).startswith(f"judge.model={tmp_path}/mine: ") and "\n" not in str(refused.value)
