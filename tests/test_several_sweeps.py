"""Several sweeps aggregated together: points that differ in what no sweep varied itself are not taken for the same."""

import subprocess
import sys

import pandas as pd
import pytest
import yaml

from sweeps.search.variants import telling_apart
from tests.support.commands import ROOT, SMALL, environment, train


def study(method="dpo", **settings):
    return {"setup": "s", "method": method, "init": "sft", "settings": settings}


def test_settings_that_differ_between_sweeps_are_named():
    apart = telling_apart([[study(a=1, b=2)], [study(a=1, b=3)], [study("ipo", a=1, b=4)]])
    assert apart == [{("s", "dpo", "sft"): "b=2"}, {("s", "dpo", "sft"): "b=3"}, {("s", "ipo", "sft"): "b=4"}]
    (one, two) = telling_apart([[study(**{"method.g": 1})], [study("ipo", **{"method.g": 2})]])
    assert not any([*one.values(), *two.values()])  # what belongs to a method differs between methods


def test_what_one_sweep_varies_is_named_for_those_that_do_not():
    apart = telling_apart([[study(a=1)], [study(a=1, b=3)]])  # the first varied b: its points say so themselves
    assert apart == [{("s", "dpo", "sft"): ""}, {("s", "dpo", "sft"): "b=3"}]


def test_a_choice_of_group_stands_for_what_it_sets():
    one, two = ({"model.name": name, "model.path": f"org/{name}"} for name in ("a", "b"))
    assert telling_apart([[study(**one)], [study(**two)]])[1] == {("s", "dpo", "sft"): "model.name=b"}
    apart = telling_apart([[study(**one)], [study(**two)], [study(**one, **{"model.lora.rank": 16})]])
    assert apart[2] == {("s", "dpo", "sft"): "model.name=a model.lora.rank=16"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Sweeps over the same betas, after SFT on all and on a quarter of the rows; and one that the first contains."""
    folder = tmp_path_factory.mktemp("several")
    run = ["-m", "method=dpo,ipo", *SMALL, f"output_dir={folder}"]
    train(*run, "beta=0.1,1", "sweep.name=full")
    train(*run, "beta=0.1,1", "sweep.name=quarter", "dataset.sft_size=32")
    train(*run, "beta=0.1", "sweep.name=part")
    return folder / "sweeps"


def aggregate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sweeps.aggregate", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def test_sweeps_that_differ_are_compared_side_by_side(two):
    done = aggregate(two / "full", two / "quarter")
    assert done.returncode == 0, done.stderr
    points = pd.read_csv(two / "full+quarter" / "points.csv")
    assert sorted(set(points.variant)) == ["dataset.sft_size=128", "dataset.sft_size=32"] and len(points) == 8
    best = pd.read_csv(two / "full+quarter" / "tables" / "best.csv")
    assert list(best.groupby("Variant").size()) == [2, 2]
    report = (two / "full+quarter" / "report.html").read_text()
    assert "full + quarter" in report and report.count("sweep.name=") >= 2
    assert set(yaml.safe_load((two / "full+quarter" / "best.yaml").read_text())["mini_tldr"]) == {"dpo", "ipo"}


def test_a_point_of_two_sweeps_is_one(two):
    done = aggregate(two / "full", two / "part", "--out", two / "both")
    assert done.returncode == 0, done.stderr
    both, full = (pd.read_csv(two / name / "points.csv") for name in ("both", "full"))
    assert len(both) == len(full) == 4 and both.variant.isna().all()


def test_a_folder_that_is_no_sweep_is_named(two):
    done = aggregate(two / "full", two / "nothing")
    assert done.returncode == 2 and "nothing: no sweep.json there" in done.stderr
    assert not (two / "full+nothing").exists()
