"""Several sweeps aggregated together: settings that vary only between the sweeps are part of the variants."""

import pandas as pd
import pytest
import yaml

from sweeps.search.variants import disambiguating_settings
from tests.support.commands import SMALL, run_in_process, train

pytestmark = pytest.mark.slow


def study(method="dpo", **settings):
    return {"setup": "s", "method": method, "init": "sft", "settings": settings}


def test_settings_that_differ_between_sweeps_are_added():
    additions = disambiguating_settings([[study(a=1, b=2)], [study(a=1, b=3)], [study("ipo", a=1, b=4)]])
    expected = [(("s", "dpo", "sft"), 2), (("s", "dpo", "sft"), 3), (("s", "ipo", "sft"), 4)]
    assert additions == [{key: {"b": value}} for key, value in expected]
    (one, two) = disambiguating_settings([[study(**{"method.g": 1})], [study("ipo", **{"method.g": 2})]])
    assert not any([*one.values(), *two.values()])  # settings of a method differ between methods anyway


def test_a_setting_that_one_sweep_varies_is_added_to_the_others():
    # The first sweep varied b, so b is part of its variants.
    additions = disambiguating_settings([[study(a=1)], [study(a=1, b=3)]])
    assert additions == [{("s", "dpo", "sft"): {}}, {("s", "dpo", "sft"): {"b": 3}}]


def test_the_name_of_a_group_replaces_the_settings_it_determines():
    one, two = ({"model.name": name, "model.path": f"org/{name}"} for name in ("a", "b"))
    assert disambiguating_settings([[study(**one)], [study(**two)]])[1] == {("s", "dpo", "sft"): {"model.name": "b"}}
    additions = disambiguating_settings([[study(**one)], [study(**two)], [study(**one, **{"model.lora.rank": 16})]])
    assert additions[2] == {("s", "dpo", "sft"): {"model.name": "a", "model.lora.rank": 16}}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Sweeps over the same betas, after SFT on all and on a quarter of the rows, and one that the first contains."""
    folder = tmp_path_factory.mktemp("several")
    arguments = ["-m", "method=dpo,ipo", *SMALL, f"output_dir={folder}"]
    train(*arguments, "beta=0.1,1", "sweep.name=full")
    train(*arguments, "beta=0.1,1", "sweep.name=quarter", "dataset.sft_size=32")
    train(*arguments, "beta=0.1", "sweep.name=part")
    return folder / "sweeps"


def aggregate(*arguments):
    return run_in_process(*arguments, module="sweeps.aggregate")


def test_sweeps_that_differ_are_compared_side_by_side(sweeps):
    done = aggregate(sweeps / "full", sweeps / "quarter")
    assert done.returncode == 0, done.stderr
    points = pd.read_csv(sweeps / "full+quarter" / "points.csv")
    assert sorted(set(points.variant)) == ["dataset.sft_size=128", "dataset.sft_size=32"] and len(points) == 8
    best = pd.read_csv(sweeps / "full+quarter" / "tables" / "best.csv")
    assert list(best.groupby("Variant").size()) == [2, 2]
    titles = list(pd.read_csv(sweeps / "full+quarter" / "tables" / "paper_table_7.csv"))
    assert titles == ["Method", *(f"mini_tldr, sft_size={n} {name}" for n in (32, 128) for name in ("lr", "beta"))]
    report = (sweeps / "full+quarter" / "report.html").read_text()
    assert "full + quarter" in report and report.count("sweep.name=") >= 2
    assert set(yaml.safe_load((sweeps / "full+quarter" / "best.yaml").read_text())["mini_tldr"]) == {"dpo", "ipo"}


def test_a_point_of_two_sweeps_is_one_row(sweeps):
    done = aggregate(sweeps / "full", sweeps / "part", "--out", sweeps / "both")
    assert done.returncode == 0, done.stderr
    both, full = (pd.read_csv(sweeps / name / "points.csv") for name in ("both", "full"))
    assert len(both) == len(full) == 4 and both.variant.isna().all()


def test_a_folder_without_a_sweep_is_named(sweeps):
    done = aggregate(sweeps / "full", sweeps / "nothing")
    assert done.returncode == 2 and "nothing: no sweep.json in it" in done.stderr
    assert not (sweeps / "full+nothing").exists()
