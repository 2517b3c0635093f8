"""Secrets in a command line or a config are refused before anything is written, and are repeated nowhere."""

import pytest
import yaml

from src.config.secrets import check_arguments, check_secret, find_secret
from src.errors import ConfigError
from tests.support.commands import run_in_process

CANARY = "canary7f3K9x2Qw8Zp5LmN4v"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"

# arguments, the key that the refusal names
REFUSED = [
    ("judge.base_url=https://user:{}@host/v1", "judge.base_url"),
    ("judge.base_url=https://user:pa/ss{}@host", "judge.base_url"),
    ("judge.base_url='https://host/v1?api-key={}'", "judge.base_url"),
    ("judge.base_url='https://host/v1?a=b&token={}'", "judge.base_url"),
    ("judge.base_url='https://host/v1?sig={}'", "judge.base_url"),
    ("judge.base_url='https://host/v1?X-Amz-Signature={}'", "judge.base_url"),
    ("judge.api_key_env=sk-{}", "judge.api_key_env"),
    ("judge.model=hf_{}", "judge.model"),
    ("judge.model=ghp_{}", "judge.model"),
    ("model.path=AKIAIOSFODNN7EXAMPLE", "model.path"),
    ("sweep.name=eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.{}", "sweep.name"),
    ("model.lora.targets=[q_proj,sk-{}]", "model.lora.targets"),
    ("+hydra.job.env_set.OPENAI_API_KEY={}", "hydra.job.env_set.OPENAI_API_KEY"),
    ("+hydra.job.env_set.WANDB_API_KEY=" + WANDB_KEY, "hydra.job.env_set.WANDB_API_KEY"),
    ("hydra.launcher.environment.HF_TOKEN={}", "hydra.launcher.environment.HF_TOKEN"),
    ("+hydra.launcher.environment={{MY_PASSWORD:{}}}", "hydra.launcher.environment"),
    ("hydra.launcher.setup=['export HF_TOKEN={}']", "hydra.launcher.setup"),
    ("server.command='vllm serve {{checkpoint}} --port {{port}} --api-key {}'", "server.command"),
    ("setup.name=sk-{}", "setup.name"),
    ("sk-{}", "argument 1"),
    ("--config-dir=https://u:{}@h", "--config-dir"),
    ("+nosuch={{a: 'Bearer {}'}}", "nosuch"),
]


@pytest.mark.parametrize(("argument", "key"), REFUSED, ids=[argument for argument, _ in REFUSED])
@pytest.mark.parametrize("sweep", [[], ["-m", "beta=0.1,1"]], ids=["run", "sweep"])
def test_a_secret_on_the_command_line_is_nowhere(argument, key, sweep, tmp_path):
    secret = argument.format(CANARY)
    done = run_in_process(secret, *sweep, f"output_dir={tmp_path}/outputs")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {key}: contains "), line
    for text in (done.stdout, line):
        assert CANARY not in text and WANDB_KEY not in text and "AKIAIOS" not in text
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("sweep", [[], ["-m", "beta=0.1,1"]], ids=["run", "sweep"])
@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"judge": {"base_url": f"https://user:{CANARY}@host"}}, "judge.base_url"),
        ({"hydra": {"job": {"env_set": {"OPENAI_API_KEY": CANARY}}}}, "hydra.job.env_set.OPENAI_API_KEY"),
        ({"model": {"lora": {"targets": ["q_proj", f"sk-{CANARY}"]}}}, "model.lora.targets[1]"),
    ],
)
def test_a_secret_in_a_users_yaml_is_nowhere(content, key, sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    done = run_in_process("--config-dir", str(tmp_path), *sweep, "+sweep=mine", f"output_dir={tmp_path}/outputs")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"{key}: contains " in line and CANARY not in line + done.stdout
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("sweep", [[], ["-m", "beta=0.1,1"]], ids=["run", "sweep"])
def test_a_secret_of_the_wrong_type_in_a_users_yaml_is_nowhere(sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    command = ["--config-dir", str(tmp_path), *sweep, "+sweep=mine", f"output_dir={tmp_path}/outputs"]
    for value, shown in (("many", "'many'"), (f"sk-{CANARY}", "'[secret]'")):
        (tmp_path / "sweep" / "mine.yaml").write_text(f"# @package _global_\njudge: {{max_tokens: {value}}}")
        done = run_in_process(*command)
        assert done.returncode == 2 and shown in done.stderr and "judge.max_tokens" in done.stderr, done.stderr
        assert CANARY not in done.stderr + done.stdout and not (tmp_path / "outputs").exists()


def test_what_only_resembles_a_secret_is_allowed():
    allowed = {
        "model.revision": WANDB_KEY,
        "model.path": f"/cache/models--a--b/snapshots/{WANDB_KEY}",
        "output_dir": "outputs/store/align/0123456789abcdef01234567",
        "judge.base_url": "https://host:8000/v1?version=2",
        "judge.api_key_env": "OPENAI_API_KEY",
        "dataset.path": "data/task-preferences_key.jsonl",
        "model.template": "tokenizer",
        "model.end_token": "<|im_end|>",
        "trainer.max_tokens_per_micro_batch": "4096",
        "hydra.launcher.environment.TOKENIZERS_PARALLELISM": "false",
        "hydra.launcher.environment.HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "hydra.launcher.environment.GIT_COMMIT": WANDB_KEY,
        "hydra.launcher.setup": "export HF_TOKEN=$(cat ~/.token)",
        "server.command": "vllm serve {checkpoint} --port {port} --tokenizer x --api-key $VLLM_KEY",
        "evaluation.prompts_file": "./sk-learn/prompts.json",
        "sweep.name": "basic-research",
        "judge.model": "meta-llama/Llama-3.3-70B-Instruct",
        "beta": "${best:beta}",
        "hydra.sweeper.params": "beta=range(1,3)",
    }
    for key, value in allowed.items():
        assert find_secret(key, value) is None, key
    check_arguments([f"{key}={value}" for key, value in allowed.items()])
    check_secret("dataset.sft.columns", {"prompt": "token", "chosen": "key"})
    with pytest.raises(ConfigError, match=r"^hydra.job.env_set.A_TOKEN: contains"):
        check_secret("hydra.job.env_set", {"A_TOKEN": CANARY})
