"""AlpacaEval's win rates from annotations, also with the length of responses controlled for."""

import json
import math
import random
import subprocess
import sys
import time

import pandas as pd
import pytest

from src.config.validation import build_point
from src.errors import ConfigError
from src.judges.alpaca_eval import check_annotations
from src.judges.difficulties import check_difficulties, why_unreachable
from src.planning.stage import stages_of
from tests.support.commands import ROOT, environment
from tests.support.configs import composed


def annotations(gain=0.0, length=0.0, seed=0, count=805):
    """Return annotations of a model whose log-odds to win are `gain`, plus `length` per deviation of extra length."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        longer = rng.gauss(1, 1)
        chance = 1 / (1 + math.exp(-(gain + length * math.tanh(longer) + difficulty(n))))
        sizes = 2000, max(1, round(2000 + 400 * longer))
        rows.append(
            {
                "instruction": f"question {n}",
                "output_1": "b" * sizes[0],
                "output_2": "m" * sizes[1],
                "generator_1": "gpt4_1106_preview",
                "generator_2": "mine",
                "annotator": "weighted_alpaca_eval_gpt4_turbo",
                "preference": 1 + min(1, max(0, rng.gauss(chance, 0.05))),
            }
        )
    return rows


def difficulty(n):
    return 1.5 * math.sin(n)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Write a hub cache with the benchmark's table of difficulties: its layout, with made-up numbers."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    rng = random.Random(1)
    rows = [
        {
            "index": n,
            "model": model,
            "preference": 1 / (1 + math.exp(-(1.5 * math.tanh(shift) + difficulty(n)))) + rng.gauss(0, 0.01),
            "std_delta_len": -shift,  # the baseline's length less the model's
            "instruction_difficulty": difficulty(n),
            "not_gamed_baseline": False,
        }
        for model, shift in (("concise", -1), ("verbose", 1))
        for n in range(805)
    ]
    table = pd.DataFrame(rows)
    table["preference"] = table["preference"].clip(0.001, 0.999)
    table.to_csv(repository / "snapshots" / ("0" * 40) / "df_gamed.csv", index=False)
    return home


def win_rates_of(folder, rows, hub=None, *options):
    """Run the command; return the process and the rates it printed."""
    order, file = folder / "questions.json", folder / "annotations.json"
    order.write_text(json.dumps([{"instruction": f"question {n}"} for n in range(805)]))
    file.write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-m", "src.judges.alpaca_eval", str(file), "--questions", str(order), *options],
        cwd=ROOT,
        env=environment() | ({"HF_HOME": str(hub)} if hub else {"HF_HOME": str(folder / "none")}),
        capture_output=True,
        text=True,
        check=False,
    )
    figures = (line.split() for line in done.stdout.splitlines()[1:])
    return done, {name: float(value) for name, value, _, _ in figures}


@pytest.mark.slow
def test_a_win_rate_by_length_alone_vanishes_when_length_is_controlled(hub, tmp_path):
    done, longer = win_rates_of(tmp_path, annotations(length=1.5), hub)
    assert done.returncode == 0 and "mine against gpt4_1106_preview, 805 preferences" in done.stdout, done.stderr
    assert longer["win_rate"] > 60
    assert longer["length_controlled_win_rate"] == pytest.approx(50, abs=5)
    (table,) = hub.rglob("df_gamed.csv")
    assert win_rates_of(tmp_path, annotations(length=1.5), None, "--difficulties", str(table))[1] == longer
    better = win_rates_of(tmp_path, annotations(gain=1.0), hub)[1]
    # Negative control: a better model of equal length keeps its win rate.
    assert better["win_rate"] > 62 and better["length_controlled_win_rate"] > 60


def test_annotations_in_another_order_or_number_are_refused(hub, tmp_path):
    rows = annotations(gain=1.0)
    done, _ = win_rates_of(tmp_path, [rows[1], rows[0], *rows[2:]], hub)
    assert done.returncode == 2 and "entry 0: expected the instruction 'question 0'" in done.stderr, done.stderr
    done, _ = win_rates_of(tmp_path, rows[:-1], hub)
    assert done.returncode == 2 and "ends after 804 annotations of 805 instructions" in done.stderr, done.stderr
    done, _ = win_rates_of(tmp_path, [*rows[:-1], rows[-1] | {"generator_2": "another"}], hub)
    assert done.returncode == 2 and "'another' and 'mine'; must be one" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"preference": 0.5},
        {"preference": True},
        {"preference": "1"},
        {"preference": [1]},
        {"output_2": None},
        {"generator_2": ["mine"]},
        {"instruction": 7},
    ],
)
def test_an_annotation_with_a_wrong_value_is_named(change):
    rows = [(f"file, entry {n}", row) for n, row in enumerate(annotations(count=3))]
    instructions = [row["instruction"] for _, row in rows]
    for preference in (0, None, math.nan, 1.0, 2):  # the control
        rows[1][1]["preference"] = preference
        assert len(check_annotations(rows, instructions)) == 3
    rows[1][1].update(change)
    with pytest.raises(ConfigError, match=f"^file, entry 1: {next(iter(change))}"):
        check_annotations(rows, instructions)


def test_without_the_table_of_difficulties_there_is_only_the_win_rate_and_a_warning(tmp_path):
    done, rates = win_rates_of(tmp_path, annotations())
    assert done.returncode == 0 and rates["win_rate"] > 0 and "length_controlled_win_rate" not in rates
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("no length-controlled win rate: HF_HUB_OFFLINE is set; judge.difficulties=FILE, or")


def test_a_hub_whose_name_does_not_resolve_is_not_tried_for_minutes(monkeypatch):
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    started = time.monotonic()
    assert why_unreachable().startswith("hub.invalid cannot be resolved: ") and time.monotonic() - started < 60
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the control: a name that resolves is tried
    assert why_unreachable() is None
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert why_unreachable() is None  # the proxy resolves it


HEADER = "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
ROWS = [f"{n},concise,0.5,1.0,0.25,False" for n in range(805)] * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no column model"),
        ([HEADER.replace("preference", "p"), *ROWS], "has no column preference"),
        ([HEADER, *ROWS[:7]], "has 7 rows; it needs one for each of 805 instructions"),
        ([HEADER, ROWS[1], ROWS[0], *ROWS[2:]], "row 1 has index 1; it must be 0"),
        ([HEADER, ROWS[0], "1,concise,much,1.0,0.2,False", *ROWS[2:]], "cannot be read as AlpacaEval's df_gamed.csv"),
        ([HEADER, ROWS[0], "1,concise"], "cannot be read"),
        ([HEADER, "\udcff"], "cannot be read"),
    ],
)
def test_a_file_that_is_no_table_of_difficulties_is_one_line_that_names_it(lines, message, tmp_path):
    file = tmp_path / "df_gamed.csv"
    file.write_text("\n".join([HEADER, *ROWS]))
    check_difficulties(str(file), "judge.difficulties")  # the control
    file.write_text("\n".join(lines), errors="surrogateescape")
    with pytest.raises(ConfigError, match=message) as refused:
        check_difficulties(str(file), "judge.difficulties")
    assert str(refused.value).startswith(f"judge.difficulties={file}: ") and "\n" not in str(refused.value)


def test_the_table_of_difficulties_counts_by_its_content_where_it_is_named(tmp_path):
    def identity(*overrides):
        options = ["judge=alpaca_eval", "judge.baseline=sft", *overrides]
        return stages_of(build_point(composed(*options)))[-1].identity

    files = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for file, text in zip(files, ("1", "1", "2"), strict=True):
        file.write_text(text)
    hub, first, same, other = identity(), *(identity(f"judge.difficulties={file}") for file in files)
    assert first == same and len({hub, first, other}) == 3
    with pytest.raises(ConfigError, match=r"judge\.difficulties=nowhere: no such file"):
        identity("judge.difficulties=nowhere")
    with pytest.raises(ConfigError, match=r"judge\.difficulties: judge=arena_hard has no such field"):
        identity("judge=arena_hard", f"judge.difficulties={files[0]}")
