"""Every option of conf/ composes, and every wrong request is refused in one line that names the override."""

import re
from pathlib import Path

import pytest
import yaml

from src.config.fields import choices_of
from src.config.judge_rules import JUDGES
from src.config.schema import CONF_DIR, Dataset, HubTable, Judge, method_options
from src.config.validation import build_point
from src.data.adapters import ADAPTERS
from src.data.sources import SOURCES
from src.errors import ConfigError
from src.methods import METHODS
from src.preflight import check_packages
from tests.support.commands import run_in_process, train
from tests.support.configs import composed


def options(group):
    return sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))


TUNED = [setup for setup in options("setup") if setup != "mistral_7b_uf"]


def best_of(setup):
    return yaml.safe_load((CONF_DIR / "setup" / f"{setup}.yaml").read_text())["setup"]["best"]


@pytest.mark.parametrize(("setup", "method"), [(s, m) for s in TUNED for m in best_of(s)])
def test_every_setup_runs_its_methods_at_its_own_best_values(setup, method, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data = [f"dataset.path={pairs}"] if setup == "smollm2_jsonl" else []
    point = build_point(composed(f"setup={setup}", f"method={method}", *data))
    best = point.setup.best[method]
    assert (point.beta, point.lr) == (best.beta, best.lr)
    assert set(point.setup.best) == set(point.beta_grid) == set(point.lr_grid)


@pytest.mark.parametrize("setup", [s for s in TUNED if s != "smollm2_jsonl"])
def test_best_values_lie_on_the_setups_own_grids(setup):
    point = build_point(composed(f"setup={setup}"))
    for method, best in point.setup.best.items():
        assert best.beta in point.beta_grid[method], method
        assert best.lr in point.lr_grid[method], method


GROUPS = ["init", "method", "engine", "evaluation", "judge", "server", "tracking", "trainer", "beta_grid", "lr_grid"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group):
    for option in options(group):
        needed = ["beta=1", "lr=1e-5"] if (group, option) == ("init", "base") else []
        needed += ["evaluation=preference"] if (group, option) == ("judge", "none") else []
        needed += ["judge.model=some/name"] if (group, option) == ("judge", "reward_model") else []
        if option in ("alpaca_eval", "arena_hard"):  # of judge and of evaluation
            needed += ["evaluation.prompts_file=README.md", "judge.baseline=README.md"]
            needed += ["judge=arena_hard"] if group == "evaluation" else []
        build_point(composed(f"{group}={option}", *needed))


def test_the_papers_grids_have_the_papers_number_of_points():
    def count(beta_grid, lr_grid):
        point = build_point(composed(f"beta_grid={beta_grid}", f"lr_grid={lr_grid}"))
        return sum(len(betas) * len(point.lr_grid[method]) for method, betas in point.beta_grid.items())

    assert count("paper", "paper_llama") == 200
    assert count("paper", "paper_llama_8b") == 179
    assert count("paper_3b_tldr", "paper_llama") == 200 + 4 * (5 + 2 + 2 + 3)
    assert count("paper_3b_uf", "paper_llama") == 200 + 4 * 2


def test_every_key_of_every_config_has_a_comment():
    """Lists by method, names of groups and the columns of tables are explained at the top of their file."""
    explained_above = ("beta_grid", "lr_grid", "setup", "sweep")
    tables = ("train.yaml", "gpus.yaml", "hub_configs.yaml")
    for path in CONF_DIR.rglob("*.yaml"):
        text = path.read_text()
        assert text.startswith("#"), f"{path}: must begin with a comment"
        if path.parent.name not in explained_above and path.name not in tables:
            for line in text.splitlines():
                bare = re.match(r"^ *(?!name|_target_)[a-z_]+: [^#]+$", line)
                assert not bare, f"{path}: {line.strip()}: has no comment"


def test_every_method_has_a_config_and_the_schema_has_its_options():
    assert options("method") == sorted(METHODS) == sorted(best_of("mini_tldr"))
    for method, spec in METHODS.items():
        point = build_point(composed(f"method={method}", "beta=1", "lr=1e-3"))
        assert all(isinstance(value, float) for value in method_options(point).values())
        assert set(method_options(point)) == set(spec.options)


def test_choices_of_the_schema_are_the_entries_of_the_registries():
    """The schema cannot import the registries, which are in packages that import the schema."""
    assert choices_of(Dataset, "source") == tuple(SOURCES)
    assert choices_of(HubTable, "adapter") == (None, *ADAPTERS)
    assert choices_of(Judge, "name") == ("none", *JUDGES)


def test_command_line_wins_over_the_setup():
    assert build_point(composed("setup=mini_tldr", "trainer=paper")).trainer.align.batch_size == 128
    assert build_point(composed("beta=0.7")).beta == 0.7


def test_best_from_reads_the_aggregators_file(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"mini_tldr": {"dpo": {"beta": 0.42, "lr": 3e-4}}}))
    point = build_point(composed(f"best_from={path}"))
    assert (point.beta, point.lr) == (0.42, 3e-4)


BAD = [
    (["foo=1"], "foo"),
    (["+foo=1"], "foo"),
    (["trainer.algin.lr=1"], "algin"),
    (["trainer.align.lr=1e-4"], "trainer.align.lr"),
    (["trainer.sft.adam_betas=[0.9,1.5]"], "trainer.sft.adam_betas[1]=1.5: must be >= 0 and < 1"),
    (["output_dir=/dev/null/x"], "output_dir"),
    (["model.path=package://foo.bar/x"], "the package foo.bar is not installed"),
    (["setup=llama32_3b_tldr", "dataset.path=nosuchfolder"], "dataset.path=nosuchfolder: missing folder sft"),
    (["beta=abc"], "beta"),
    (["beta=0"], "beta=0: must be > 0"),
    (["beta=-1"], "beta=-1: must be > 0"),
    (["beta=nan"], "beta=nan"),
    (["lr=0"], "lr=0: must be > 0"),
    (["seed=1.5"], "seed"),
    (["trainer.align.batch_size=0"], "trainer.align.batch_size=0: must be >= 1"),
    (["method=ppo"], "method/ppo"),
    (["setup=nosuch"], "setup/nosuch"),
    (["setup=mistral_7b_uf"], "setup=mistral_7b_uf init=sft has no best beta for method=dpo: set beta=VALUE"),
    (["method.gamma_beta_ratio=1"], "method=dpo has no such field"),
    (["method=simpo", "method.gamma_beta_ratio=null"], "method=simpo needs a value"),
    (["method=simpo", "method.gamma_beta_ratio=-1"], "method.gamma_beta_ratio=-1: must be >= 0"),
    (
        ["method=cal_dpo", "method.calibration_weight=nan"],
        "method.calibration_weight=nan: must be a finite number >= 0",
    ),
    (["beta_grid.dpo=[]"], "beta_grid.dpo=[]: an empty grid"),
    (["+lr_grid.ppo=[1]"], "lr_grid.ppo: no such method"),
    (["beta=grid"], "add -m"),
    (["method=all"], "add -m"),
    (["setup=smollm2_jsonl"], "dataset.path is not set"),
    (["setup=smollm2_jsonl", "dataset.path=/nowhere.json"], "dataset.path=/nowhere.json: no such file"),
    (["model.path=./nowhere"], "model.path=./nowhere: no such file"),
    (["dataset.max_prompt_tokens=160"], "must be below dataset.max_tokens"),
    (["judge=none"], "needs a judge"),
    (["-m", "beta=1,2", "sweep.name=../x"], "sweep.name=../x: becomes a folder name"),
    (["init=base", "method=orpo"], "init=base has no best beta"),
    (["engine.precision=fp8"], "must be one of fp32, bf16"),
    (["engine.strategy=zero4"], "must be one of none, ddp, fsdp, zero1, zero2, zero3, zero3_offload"),
    (["engine.precision=bf16"], "engine.strategy=none holds one copy of the weights"),
    (["engine=ddp", "engine.precision=bf16"], "choose engine=fsdp"),
    (["engine.activation_checkpointing=2"], "engine.activation_checkpointing=2"),
    (["engine.activation_checkpointing=some"], "some: must be one of auto, true, false"),
    (["dataset.sft_fraction=1.5"], "dataset.sft_fraction=1.5: must be >= 0 and <= 1"),
    (["evaluation.generation.top_p=0"], "evaluation.generation.top_p=0: must be > 0 and <= 1"),
    (["beta=inf"], "beta=inf: must be a finite number > 0"),
    (["model.attention=varlen"], "model.attention=varlen requires engine.precision=bf16"),
    (["model.lora.rank=0"], "model.lora.rank=0: must be >= 1"),
    (["best_from=/nowhere.yaml"], "best_from=/nowhere.yaml"),
    (["-m", "method=dpo,ipo", "beta=0.1,-1"], "beta=-1: must be > 0"),
    (["-m", "beta=0.1,abc"], "beta=abc"),
    (["-m", "method=dpo", "lr=grid", "~lr_grid.dpo"], "no list for method=dpo"),
    (["-m", "beta=grid", "beta_grid.dpo=[]"], "empty grid"),
    (["-m", "beta=choice()"], "beta"),
    (["-m", "method=dpo,ppo"], "method/ppo"),
    (["-m", "hydra.launcher.workers=0", "beta=1,2"], "hydra.launcher.workers=0"),
    (["-m", "hydra/launcher=basic", "beta=1,2"], "hydra/launcher"),
    (["-m", "setup=mini_tldr,smollm2_jsonl", "beta=0.1,1"], "setup=smollm2_jsonl beta=0.1 output_dir="),
    (["-m", "sweep.name=a,b"], "sweep.name: must be one value for a whole sweep"),
    (["-m", "sweep.keep_fraction=0.3,0.5"], "sweep.keep_fraction: must be one value for a whole sweep"),
    (
        ["-m", "beta=0.1,1", "sweep.search=successive_halving", "sweep.rungs=[0.5]"],
        "sweep.rungs=[0.5]: must be an increasing list",
    ),
    (["sweep.search=successive_halving"], "sweep.search=successive_halving needs a sweep: add -m"),
    (["-m", "hydra/sweeper=basic", "beta=1,2"], "hydra/sweeper=grid"),
    (["+sweep=nosuch"], "sweep/nosuch"),
]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("judge.base_url", "https://me:canary@host/v1"),
        ("judge.base_url", "http://canary@host"),
        ("judge.api_key_env", "sk-canary"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(key, value):
    with pytest.raises(ConfigError) as refused:
        build_point(composed("judge=tldr", f"{key}={value}"))
    assert str(refused.value).startswith(f"{key}: ") and "canary" not in str(refused.value)


def test_a_missing_package_is_named_before_a_launch_and_not_needed_for_a_plan(monkeypatch):
    point = build_point(composed("engine=zero3"))
    check_packages([point])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine.strategy=zero3 needs the package deepspeed: pip install"):
        check_packages([point])
    check_packages([build_point(composed())])


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_bad_request_is_one_line_exit_code_two_and_nothing_runs(arguments, message, tmp_path):
    output_dir = [] if any(a.startswith("output_dir=") for a in arguments) else [f"output_dir={tmp_path}"]
    done = run_in_process(*arguments, *output_dir)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert message in lines[0]
    assert "To append to your config" not in lines[0]
    assert not (tmp_path / "store").exists() and not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("sweep", [[], ["-m", "beta=0.1,1"]])
def test_a_bad_row_of_the_data_is_found_before_anything_runs(sweep, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    done = train(
        *sweep, "setup=smollm2_jsonl", "model=mini", f"dataset.path={path}", f"output_dir={tmp_path}", check=False
    )
    assert done.returncode == 2 and f"{path}, line 2: missing field 'rejected'" in done.stderr
    assert not (tmp_path / "store").exists()


def test_best_from_of_another_init_is_refused(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"mini_tldr": {"dpo": {"beta": 0.4, "lr": 1e-5, "init": "base"}}}))
    done = train(f"best_from={path}", f"output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and "add init=base" in done.stderr


def test_no_yaml_has_a_path_of_one_persons_machine():
    for path in Path(CONF_DIR).rglob("*.yaml"):
        assert "/home/" not in path.read_text() and "/root/" not in path.read_text()
