"""Tables of the hub: every layout of a local copy reads the same, filters, and errors before a run."""

import logging
import time
from dataclasses import replace

import datasets
import pandas as pd
import pytest

from src.config.schema import CONF_DIR, Dataset, HubTable, Point
from src.config.validation import build_point
from src.data.sources import open_source
from src.data.tables import Hub
from src.errors import ConfigError
from src.planning.inputs import pair_data, sft_data
from src.planning.resources import resources_of
from src.planning.stage import stages_of
from src.store.attempt import Attempt
from src.store.lease import Lease
from tests.support import tiny_llama
from tests.support.commands import run_in_process
from tests.support.configs import composed

PAIRS = [
    {"prompt": [{"role": "user", "content": f"p{n}"}], "chosen": f"a{n}", "rejected": f"b{n}", "score": n / 2}
    for n in range(40)
]
SPLITS = {"train": PAIRS[:30], "validation": PAIRS[30:]}


def parquet(folder, splits):
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def shards(folder, splits):
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        for number, part in enumerate((rows[:7], rows[7:])):
            pd.DataFrame(part).to_parquet(folder / "data" / f"{split}-0000{number}-of-00002.parquet")


def json_lines(folder, splits):
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        pd.DataFrame(rows).to_json(folder / f"{split}.jsonl", orient="records", lines=True)


def saved(folder, splits):
    tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(folder)


def arrow(folder, splits):
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        one = folder.parent / f"{folder.name}-{split}"
        datasets.Dataset.from_list(rows).save_to_disk(one)
        (one / "data-00000-of-00001.arrow").rename(folder / "data" / f"{split}-00000-of-00001.arrow")


def hub_point(folder, sft=None, preference=None, **sizes):
    sft, preference = sft or HubTable("x/sft"), preference or HubTable("x/preference")
    path = None if folder is None else str(folder)
    return Point(dataset=Dataset("d", "hub", path, sft=sft, preference=preference, **sizes))


def hub(*arguments, **sizes):
    """A source that reads both tables; a stage reads one of them."""
    point = hub_point(*arguments, **sizes)
    pairs, demonstrations = pair_data(point), sft_data(point)
    both = replace(pairs, sft=demonstrations.sft, sft_size=demonstrations.sft_size)
    return Hub(both, resources_of(point, pairs).expected_rows)


@pytest.mark.parametrize("write", [parquet, shards, json_lines, saved, arrow])
def test_every_layout_of_a_table_reads_the_same(write, tmp_path):
    for name in ("sft", "preference"):
        write(tmp_path / name, SPLITS)
    source = hub(tmp_path)
    source.check()
    assert [(p.prompt.text, p.chosen, p.rejected) for p in source.pairs("train")] == [
        (f"p{n}", f"a{n}", f"b{n}") for n in range(30)
    ]
    assert [p.chosen for p in source.pairs("validation")] == [f"a{n}" for n in range(30, 40)]
    assert [(d.prompt.text, d.response) for d in source.demonstrations()] == [(f"p{n}", f"a{n}") for n in range(30)]
    assert [p.text for p in source.prompts(3)] == ["p30", "p31", "p32"]


def table(tmp_path, rows):
    for name in ("sft", "preference"):
        json_lines(tmp_path / name, {"train": [{"prompt": p, "chosen": w, "rejected": lo} for p, w, lo in rows]})
    return tmp_path


ROWS = [
    ("p", "a", "b"),
    ("p", "a", "c"),  # the same demonstration
    ("p", "a", "b"),  # the same pair
    ("q", "a", "b"),  # of another prompt
    ("q", "b", "c"),  # b is rejected above
    ("q", "a", "c"),
    ("r", "b", "a"),
]


def test_filters_drop_repeated_rows_and_responses_rejected_elsewhere(tmp_path):
    folder = table(tmp_path, ROWS)

    def read(**filters):
        source = hub(folder, HubTable("x/sft", **filters), HubTable("x/preference", **filters))
        return (
            [(d.prompt.text, d.response) for d in source.demonstrations()],
            [(p.prompt.text, p.chosen, p.rejected) for p in source.pairs("train")],
        )

    assert read() == ([row[:2] for row in ROWS], ROWS)
    demonstrations, pairs = read(deduplicate=True)
    assert demonstrations == [("p", "a"), ("q", "a"), ("q", "b"), ("r", "b")]
    assert pairs == ROWS[:2] + ROWS[3:]
    demonstrations, pairs = read(drop_if_rejected_elsewhere=True)
    assert pairs == [row for row in ROWS if row[:2] != ("q", "b")] and demonstrations == [p[:2] for p in pairs]
    assert read(deduplicate=True, drop_if_rejected_elsewhere=True)[0] == [("p", "a"), ("q", "a"), ("r", "b")]
    # Sizes count filtered rows, and a smaller sample is a subset of a larger one.
    samples = [
        hub(folder, HubTable("x/sft"), HubTable("x/y", deduplicate=True), train_size=n).pairs("train")
        for n in (2, 4, 9)
    ]
    assert [len(sample) for sample in samples] == [2, 4, 6]
    assert all(pair in samples[1] for pair in samples[0])


@pytest.mark.parametrize(
    ("filters", "expected", "warning"),
    [
        ({}, 7, None),
        ({}, 8, "has 7 rows; dataset.preference.rows expects 8"),
        ({"deduplicate": True}, 7, "has 6 rows of 7 after filtering; dataset.preference.rows expects 7"),
        ({"deduplicate": True}, 6, None),
        ({"deduplicate": True}, None, None),
    ],
)
def test_a_number_of_rows_other_than_the_expected_one_is_a_warning(tmp_path, caplog, filters, expected, warning):
    rows = {} if expected is None else {"train": expected}
    with caplog.at_level(logging.WARNING, "src"):
        hub(table(tmp_path, ROWS), preference=HubTable("x/y", rows=rows, **filters), train_size=3).pairs("train")
    assert [r.getMessage() for r in caplog.records] == ([f"{tmp_path}/preference/train {warning}"] if warning else [])


def test_a_source_that_the_preflight_check_opened_still_warns_in_the_stage(tmp_path, caplog):
    point = hub_point(table(tmp_path, ROWS), preference=HubTable("x/y", validation_split="train", rows={"train": 8}))
    data = pair_data(point)
    open_source(data).check()
    with caplog.at_level(logging.WARNING, "src"):
        open_source(data, resources_of(point, data).expected_rows).pairs("train")
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/preference/train has 7 rows; dataset.preference.rows expects 8"
    ]


def test_filters_change_identities_and_expected_sizes_do_not(tmp_path):
    point = build_point(composed("dataset=tldr", "judge=none", "evaluation=preference"))
    point.dataset = hub_point(table(tmp_path, ROWS)).dataset

    def identities(**changes):
        changed = replace(point, dataset=replace(point.dataset, sft=replace(point.dataset.sft, **changes)))
        return {stage.role: stage.identity for stage in stages_of(changed)}

    same = identities()
    assert identities(rows={"train": 3}, tokens=5.0) == same
    for changes in (
        {"deduplicate": True},
        {"drop_if_rejected_elsewhere": True},
        {"columns": {"chosen": "x"}},
        {"adapter": "hh"},
    ):
        assert not set(identities(**changes).values()) & {same["sft"], same["align"], same["evaluate"]}


def test_columns_of_another_name_and_transcripts_are_read(tmp_path):
    transcript = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why: so?\n\nAssistant: "
    row = {"better": transcript + "Because.", "rejected": transcript + "No."}
    for name in ("sft", "preference"):
        json_lines(tmp_path / name, {"train": [row]})
    adapted = HubTable("x/y", columns={"chosen": "better"}, adapter="hh")
    source = hub(tmp_path, adapted, adapted)
    (pair,), (demonstration,) = source.pairs("train"), source.demonstrations()
    assert [m["content"] for m in pair.prompt.messages] == ["Hi", "Yes?", "Why: so?"]
    assert (pair.chosen, pair.rejected) == ("Because.", "No.")
    assert (demonstration.prompt, demonstration.response) == (pair.prompt, "Because.")


UF = "setup=llama31_8b_uf"


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (lambda f: (f / "sft").rename(f / "chat"), (), "missing folder sft"),
        (lambda f: (f / "sft/data/train_sft-00000-of-00001.parquet").unlink(), (), "/sft (split train_sft)"),
        (
            lambda f: (f / "sft/data/train_sft-00000-of-00001.parquet").write_text("<html>"),
            (),
            "/sft (split train_sft)",
        ),
        (lambda f: None, ("dataset.preference.validation_split=test",), "Bad split: test. Available splits: ["),
        (
            lambda f: None,
            ("+dataset.preference.columns.chosen=best",),
            "train_prefs, row 0: no column 'best' for chosen",
        ),
        (lambda f: None, ("+dataset.preference.columns.chosen=score_chosen",), "row 0: chosen must be text"),
        (lambda f: None, ("dataset.sft.drop_if_rejected_elsewhere=true",), "train_sft, row 0: missing field 'chosen'"),
        (lambda f: None, ("dataset.sft.adapter=hhh",), "dataset.sft.adapter=hhh: must be one of null, hh"),
        (lambda f: None, ("dataset.preference.adapter=hh",), "row 0: expected a Human:/Assistant: transcript"),
    ],
)
def test_errors_of_a_local_copy_are_reported_before_anything_runs(damage, overrides, message, tmp_path):
    folder, model = tiny_llama.ultrachat_ultrafeedback(tmp_path / "data"), tiny_llama.model(tmp_path / "model")
    damage(folder)
    paths = [f"model.path={model}", f"dataset.path={folder}", f"output_dir={tmp_path / 'out'}"]
    done = run_in_process(UF, "method=dpo", *paths, *overrides)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("store/*"))


def test_a_table_that_cannot_be_loaded_offline_is_one_line_with_a_hint(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        hub(None, HubTable("x/nowhere"), HubTable("x/y")).demonstrations()
    assert str(error.value).startswith("dataset.sft.path=x/nowhere (split train) cannot be loaded: ")
    assert str(error.value).endswith("; dataset.path=FOLDER names a local copy") and "\n" not in str(error.value)


def test_reading_rows_reports_progress_after_two_seconds(tmp_path, monkeypatch):
    reports, now = [], [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Lease(tmp_path) as lease:
        attempt = Attempt(tmp_path, tmp_path, lease, lambda *row: reports.append(row), "sft", "identity", tmp_path)

        def read(count, seconds):
            rows = []
            for row in attempt.track(range(count), "rows"):
                now[0] += seconds
                rows.append(row)
            return rows

        assert read(10, 0.1) == list(range(10)) and reports == []
        assert read(10, 1.0) == list(range(10))
    assert reports[0][0] == "sft: rows" and reports[-1] == ("sft: rows", 10, 10)
    steps = [step for _, step, _ in reports]
    assert len(reports) > 5 and steps == sorted(steps)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF_DIR / "dataset").glob("*.yaml")))
def test_every_dataset_can_be_chosen_by_name(name, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    path = [f"dataset.path={tmp_path / 'pairs.jsonl'}"] if name == "jsonl" else []
    gold = [] if name == "mini_tldr" else ["judge=none", "evaluation=preference", "model=llama32_3b"]
    done = run_in_process(f"dataset={name}", *path, *gold, f"output_dir={tmp_path}", "dry_run=true")
    assert done.returncode == (2 if name == "jsonl" else 0), done.stderr
