"""Every option of conf/ composes, and what a config cannot have is refused."""

import re
from pathlib import Path

import pytest
import yaml

from src.config.fields import choices_of
from src.config.judge import JUDGES, Judge
from src.config.schema import CONF_DIR, Dataset, HubTable, method_options
from src.config.validation import ANY_METHOD, build_point
from src.data.adapters import ADAPTERS
from src.data.sources import SOURCES
from src.errors import ConfigError
from src.methods import COMPARED, FAMILY, METHODS, options_of
from src.preflight import check_packages
from tests.support.commands import run_in_process
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
    data += [f"evaluation.prompts_file={pairs}"] if setup.startswith("qwen25") else []
    point = build_point(composed(f"setup={setup}", f"method={method}", *data))
    best = point.setup.best[method]
    assert (point.beta, point.lr) == (best.beta, best.lr)
    assert set(point.setup.best) | set(FAMILY) <= set(point.beta_grid) and ANY_METHOD in point.lr_grid


@pytest.mark.parametrize("setup", [s for s in TUNED if s != "smollm2_jsonl"])
def test_best_values_lie_on_the_setups_own_grids(setup):
    problems = ["evaluation.prompts_file=README.md"] if setup.startswith("qwen25") else []
    point = build_point(composed(f"setup={setup}", *problems))
    for method, best in point.setup.best.items():
        assert best.beta in point.beta_grid[method], method
        assert best.lr in point.lr_grid.get(method, point.lr_grid[ANY_METHOD]), method


GROUPS = ["init", "engine", "evaluation", "judge", "server", "tracking", "trainer", "beta_grid", "lr_grid"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group):
    for option in options(group):
        needed = ["beta=1", "lr=1e-5"] if (group, option) == ("init", "base") else []
        needed += ["evaluation=preference"] if (group, option) == ("judge", "none") else []
        needed += ["judge.model=some/name"] if (group, option) == ("judge", "reward_model") else []
        needed += ["server=vllm"] if (group, option) == ("judge", "open") else []
        if option in ("alpaca_eval", "arena_hard", "arena_hard_v2"):  # of judge and of evaluation
            needed += ["evaluation.prompts_file=README.md", "judge.baseline=README.md"]
            needed += ["judge=arena_hard"] if group == "evaluation" else []
        if "mt_bench" in option:
            needed += ["evaluation=mt_bench", "evaluation.prompts_file=README.md", "judge=mt_bench"]
            needed += ["evaluation.metric=win_rate", "judge.baseline=sft"] if option == "mt_bench_pairwise" else []
            needed.remove(f"{group}={option}" if option == "mt_bench" else "judge=mt_bench")
        if option in ("math", "mini_math") and group in ("judge", "evaluation"):
            needed += ["evaluation=mini_math"] if group == "judge" else ["judge=math"]
            needed += ["dataset=mini_math", "evaluation.prompts_file=README.md"]
        build_point(composed(f"{group}={option}", *needed))


def test_the_papers_grids_have_the_papers_number_of_points():
    def count(beta_grid, lr_grid):
        point = build_point(composed(f"beta_grid={beta_grid}", f"lr_grid={lr_grid}"))
        return sum(len(point.beta_grid[method]) * len(point.lr_grid[method]) for method in COMPARED)

    assert count("paper", "paper_llama") == 200
    assert count("paper", "paper_llama_8b") == 179
    assert count("paper_3b_tldr", "paper_llama") == 200 + 4 * (5 + 2 + 2 + 3)
    assert count("paper_3b_uf", "paper_llama") == 200 + 4 * 2


def test_every_key_of_every_config_has_a_comment():
    """Lists by method, names of groups and the columns of tables are explained at the top of their file."""
    explained_above = ("beta_grid", "lr_grid", "methods", "setup", "sweep")
    tables = ("train.yaml", "gpus.yaml", "hub_configs.yaml", "retired_models.yaml")
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
        assert set(method_options(point)) == set(options_of(method, spec.score))


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


def test_a_missing_package_is_named_before_a_launch_and_not_needed_for_a_plan(monkeypatch):
    point = build_point(composed("engine=zero3"))
    check_packages([point])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine.strategy=zero3 needs the package deepspeed: pip install"):
        check_packages([point])
    check_packages([build_point(composed())])


def test_best_from_of_another_init_is_refused(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"mini_tldr": {"dpo": {"beta": 0.4, "lr": 1e-5, "init": "base"}}}))
    done = run_in_process(f"best_from={path}", f"output_dir={tmp_path}")
    assert done.returncode == 2 and "add init=base" in done.stderr


def test_no_yaml_has_a_path_of_one_persons_machine():
    for path in Path(CONF_DIR).rglob("*.yaml"):
        assert "/home/" not in path.read_text() and "/root/" not in path.read_text()
