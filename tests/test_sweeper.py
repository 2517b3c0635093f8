"""The points a sweep expands to, and that planning never imports heavy packages."""

import re
import subprocess
import sys

import pytest
import yaml

from src.config.validation import ANY_METHOD
from src.methods import COMPARED, METHODS
from tests.support.commands import ROOT, dry_run, environment, train


def listed(name):
    return yaml.safe_load((ROOT / f"conf/{name}.yaml").read_text())


def test_sweep_syntax_is_hydras_own_plus_grids():
    labels, _ = dry_run("method=dpo", "beta=0.1,0.3", "lr=1e-3")
    assert labels == ["dpo beta=0.1 lr=0.001", "dpo beta=0.3 lr=0.001"]
    assert dry_run("method=dpo", "beta=range(1,4)")[0] == [f"dpo beta={b} lr=0.001" for b in (1, 2, 3)]
    assert dry_run("method=dpo", "beta=choice(0.1,0.3)")[0] == labels
    assert [x.split()[0] for x in dry_run("method=glob(?po)")[0]] == ["dpo", "ipo"]
    assert dry_run("method=dpo", "beta=1,1.0")[0] == ["dpo beta=1 lr=0.001"]
    grids, _ = dry_run("method=dpo,nca", "beta=grid")
    betas = listed("beta_grid/mini_tldr")
    assert grids == [f"{m} beta={b:g} lr=0.001" for m in ("dpo", "nca") for b in betas[m]]
    choices = dry_run("method=dpo", "beta=grid", "beta_grid.dpo=[11,12],[13,14]")[0]
    assert choices == [f"dpo beta={b} lr=0.001" for b in (11, 12, 13, 14)]
    assert len(dry_run("method=dpo", "beta=grid,7,0.1")[0]) == len(betas["dpo"]) + 1
    assert dry_run("method=dpo", "beta=grid", "beta_grid.dpo=[5,6]")[0] == [
        "dpo beta=5 lr=0.001",
        "dpo beta=6 lr=0.001",
    ]


def test_values_set_for_one_point_do_not_reach_the_next():
    labels, _ = dry_run("method=dpo", "evaluation.generation={temperature:0.5},{top_k:5}")
    assert labels == [
        "dpo beta=0.1 lr=0.001 evaluation.generation.temperature=0.5 evaluation.generation.top_k=0",
        "dpo beta=0.1 lr=0.001 evaluation.generation.temperature=1.0 evaluation.generation.top_k=5",
    ]


def test_other_settings_that_vary_are_part_of_a_points_label():
    labels, _ = dry_run("method=simpo", "beta=1", "method.gamma_beta_ratio=0.3,0.5")
    assert labels == [f"simpo beta=1 lr=0.001 method.gamma_beta_ratio={g}" for g in (0.3, 0.5)]
    assert dry_run("method=dpo", "beta=1", "engine.cpu_threads=1,2")[0] == [
        "dpo beta=1 lr=0.001"
    ]  # no result depends on it


def test_all_methods_on_both_grids_of_the_paper():
    paper = ["setup=llama31_8b_uf", "method=all", "beta=grid", "lr=grid"]
    assert len(dry_run(*paper)[0]) == 179
    output = dry_run("setup=llama32_3b_uf", *paper[1:], "beta_grid=paper")[1]
    # 200 points share one SFT run and one set of reference log-probs.
    assert "200 points: 0 done, 200 to do" in output
    assert re.search(r"^sft +1 ", output, re.M) and re.search(r"^reference +1 ", output, re.M)


def test_all_methods_are_those_of_the_chosen_beta_grid():
    labels, _ = dry_run("method=all", "beta=1", "~beta_grid.dpo")
    assert {label.split()[0] for label in labels} == set(COMPARED) - {"dpo"}
    # A method that is named too is included, and an error names the grid it lacks.
    assert "dpo beta=1 lr=0.001" in dry_run("method=all,dpo", "beta=1", "~beta_grid.dpo")[0]
    refused = train("-m", "method=dpo", "beta=grid", "~beta_grid.dpo", check=False)
    assert refused.returncode == 2 and "no list for method=dpo; set beta_grid.dpo=[...]" in refused.stderr


@pytest.mark.parametrize(("setup", "lr"), [("mini_tldr", "mini_tldr"), ("llama32_3b_uf", "paper_llama")])
def test_the_family_is_every_method_on_the_setups_grids(setup, lr):
    labels, output = dry_run("+methods=family", f"setup={setup}", "beta=grid", "lr=grid")
    lrs = listed(f"lr_grid/{lr}")
    lrs |= {} if ANY_METHOD in lrs else {key: v for key, v in listed("lr_grid/paper").items() if key not in lrs}
    betas = listed(f"beta_grid/{'mini_tldr' if setup == 'mini_tldr' else 'paper_3b_uf'}")
    betas = listed("beta_grid/family") | listed("beta_grid/paper") | betas
    expected = {m: len(betas[m]) * len(lrs.get(m, lrs[ANY_METHOD])) for m in METHODS}
    assert {m: sum(label.split()[0] == m for label in labels) for m in METHODS} == expected
    # One set of reference log-probs for all methods that need one.
    assert re.search(r"^reference +1 ", output, re.M) and f"{sum(expected.values())} points" in output


def test_the_command_line_overrides_a_named_sweep():
    assert len(dry_run("+sweep=demo")[0]) == sum(len(listed("beta_grid/mini_tldr")[method]) for method in COMPARED)
    assert len(dry_run("+sweep=demo", "method=dpo", "beta=0.1,1")[0]) == 2


@pytest.mark.parametrize(
    ("name", "points", "sft"), [("paper_tldr_3b", 200, 1), ("paper_uf_3b", 200, 1), ("paper_uf_8b", 179, 1)]
)
def test_sweeps_of_the_paper_have_its_points_and_share_one_sft_and_one_reference(name, points, sft):
    labels, output = dry_run(f"+sweep={name}")
    assert len(labels) == len(set(labels)) == points
    assert re.search(rf"^sft +{sft} ", output, re.M) and re.search(r"^reference +1 ", output, re.M)


def test_the_grids_of_mistral_are_those_of_v3():
    labels, _ = dry_run("setup=mistral_7b_uf", "method=all", "beta=grid", "lr=grid")
    betas = {"dpo": 6, "ipo": 6, "simpo": 8, "orpo": 11, "asft": 9, "apo_zero": 6, "nca": 9, "cal_dpo": 7}
    assert {m: sum(x.split()[0] == m for x in labels) for m in betas} == {m: 4 * n for m, n in betas.items()}


@pytest.mark.slow
def test_every_named_sweep_plans():
    for path in sorted((ROOT / "conf/sweep").glob("*.yaml")):
        assert dry_run(f"+sweep={path.stem}")[0], path.stem


def test_a_sweep_in_parts_has_the_points_of_each_part_and_the_command_line_overrides_all():
    labels, _ = dry_run("+sweep=demo_init_ablation")
    assert [label for label in labels if "init=base" in label] == [
        f"{method} beta=1 lr=0.001 init=base init.align_weight={weight}"
        for method in ("orpo", "asft")
        for weight in (0.1, 1.0)
    ]
    assert [label.split()[0] for label in labels].count("dpo") == 1
    # Methods with equal settings are compared, in whatever order the parts name the settings.
    settings = {
        label.partition("init.")[2].split()[0] for label in labels if "init=base" not in label and "init." in label
    }
    assert settings == {"align_weight=0.1", "align_weight=1.0"}
    only = dry_run("+sweep=demo_init_ablation", "method=asft")[0]
    assert {label.split()[0] for label in only} == {"asft"} and len(only) == 6


def test_each_sft_fraction_has_its_own_sft_and_all_share_one_baseline():
    labels, output = dry_run("+sweep=demo_sft_fraction", "method=dpo")
    assert len(labels) == 6
    # Fraction 0 is the base model, without SFT. The judge's baseline is always the SFT model of fraction 1.
    for kind, count in (("sft", 5), ("reference", 6), ("baseline", 1)):
        assert re.search(rf"^{kind} +{count} ", output, re.M), output


PROBE = """
import runpy, sys
sys.argv = ["src.train", *{arguments!r}]
try:
    runpy.run_module("src.train", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [m for m in ("torch", "transformers", "pandas", "matplotlib", "wandb", "datasets") if m in sys.modules]
print("PROBE", heavy, file=sys.stderr)
"""


def probe(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=list(arguments))],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1], done.stdout


def test_help_and_planning_a_thousand_points_never_import_torch():
    assert probe("--help")[0].endswith("[]")
    line, output = probe("-m", "dry_run=true", "method=all", "beta=range(1,126)")
    assert line.endswith("[]") and f"{125 * len(COMPARED)} points" in output
