"""Files of a judge's prompt, in the format of Arena-Hard's judge_config.yaml."""

import os

import pytest

from src.errors import ConfigError
from src.judges.prompt_file import load_judge_prompt
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
