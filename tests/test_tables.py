"""Tables of the hub: each layout of a local copy reads the same, filters, and what is wrong is said before a run."""

import logging
import time
from dataclasses import replace

import datasets
import pandas as pd
import pytest

from src.config.schema import CONF_DIR, Dataset, HubTable
from src.config.validation import build_point
from src.data.tables import Hub
from src.errors import ConfigError
from src.planning.stage import stages_of
from src.store.attempt import Attempt
from src.store.lease import Lease
from tests.support import tiny_llama
from tests.support.commands import at_once
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


def hub(folder, sft=None, preference=None, **sizes):
    sft, preference = sft or HubTable("x/sft"), preference or HubTable("x/preference")
    return Hub(Dataset("d", "hub", str(folder), sft=sft, preference=preference, **sizes))


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


def test_filters_leave_out_what_is_there_twice_and_what_is_rejected_elsewhere(tmp_path):
    folder = table(tmp_path, ROWS)

    def read(**filters):
        source = hub(folder, HubTable("x/sft", **filters), HubTable("x/preference", **filters))
        return (
            [(d.prompt.text, d.response) for d in source.demonstrations()],
            [(p.prompt.text, p.chosen, p.rejected) for p in source.pairs("train")],
        )

    assert read() == ([row[:2] for row in ROWS], ROWS)
    demonstrations, pairs = read(distinct=True)
    assert demonstrations == [("p", "a"), ("q", "a"), ("q", "b"), ("r", "b")]
    assert pairs == ROWS[:2] + ROWS[3:]
    demonstrations, pairs = read(drop_if_rejected_elsewhere=True)
    assert pairs == [row for row in ROWS if row[:2] != ("q", "b")] and demonstrations == [p[:2] for p in pairs]
    assert read(distinct=True, drop_if_rejected_elsewhere=True)[0] == [("p", "a"), ("q", "a"), ("r", "b")]
    # Sizes are of what is left, and the fewer are part of the more.
    shares = [
        hub(folder, HubTable("x/sft"), HubTable("x/y", distinct=True), train_size=n).pairs("train") for n in (2, 4, 9)
    ]
    assert [len(share) for share in shares] == [2, 4, 6]
    assert all(pair in shares[1] for pair in shares[0])


@pytest.mark.parametrize(
    ("filters", "said", "told"),
    [
        ({}, 7, None),
        ({}, 8, "has 7 rows; dataset.preference.rows says 8"),
        ({"distinct": True}, 7, "has 6 rows of 7 after filtering; dataset.preference.rows says 7"),
        ({"distinct": True}, 6, None),
        ({"distinct": True}, None, None),
    ],
)
def test_another_number_of_rows_than_the_config_says_is_a_warning_with_both(tmp_path, caplog, filters, said, told):
    rows = {} if said is None else {"train": said}
    with caplog.at_level(logging.WARNING, "src"):
        hub(table(tmp_path, ROWS), preference=HubTable("x/y", rows=rows, **filters), train_size=3).pairs("train")
    assert [r.getMessage() for r in caplog.records] == ([f"{tmp_path}/preference/train {told}"] if told else [])


def test_filters_make_other_stages_and_what_is_said_of_a_table_does_not(tmp_path):
    point = build_point(composed("dataset=tldr", "judge=none", "evaluation=preference"))
    point.dataset = hub(table(tmp_path, ROWS)).data

    def identities(**changes):
        changed = replace(point, dataset=replace(point.dataset, sft=replace(point.dataset.sft, **changes)))
        return {stage.role: stage.identity for stage in stages_of(changed)}

    same = identities()
    assert identities(rows={"train": 3}, tokens=5.0) == same
    for changes in (
        {"distinct": True},
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
    own = HubTable("x/y", columns={"chosen": "better"}, adapter="hh")
    source = hub(tmp_path, own, own)
    (pair,), (demonstration,) = source.pairs("train"), source.demonstrations()
    assert [m["content"] for m in pair.prompt.messages] == ["Hi", "Yes?", "Why: so?"]
    assert (pair.chosen, pair.rejected) == ("Because.", "No.")
    assert (demonstration.prompt, demonstration.response) == (pair.prompt, "Because.")


UF = "setup=llama31_8b_uf"


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (lambda f: (f / "sft").rename(f / "chat"), (), "no folder sft there"),
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
        (lambda f: None, ("dataset.sft.drop_if_rejected_elsewhere=true",), "train_sft, row 0: no field 'chosen'"),
        (lambda f: None, ("dataset.sft.adapter=hhh",), "dataset.sft.adapter=hhh: must be one of null, hh"),
        (lambda f: None, ("dataset.preference.adapter=hh",), "row 0: not a conversation of Human: and Assistant:"),
    ],
)
def test_what_is_wrong_with_a_local_copy_is_said_before_anything_runs(damage, overrides, message, tmp_path):
    folder, model = tiny_llama.ultrachat_ultrafeedback(tmp_path / "data"), tiny_llama.model(tmp_path / "model")
    damage(folder)
    paths = [f"model.path={model}", f"dataset.path={folder}", f"output_dir={tmp_path / 'out'}"]
    done = at_once(UF, "method=dpo", *paths, *overrides)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("store/*"))


def test_a_table_that_cannot_be_had_offline_is_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        Hub(Dataset("d", "hub", sft=HubTable("x/nowhere"), preference=HubTable("x/y"))).demonstrations()
    assert str(error.value).startswith("dataset.sft.path=x/nowhere (split train) cannot be loaded: ")
    assert str(error.value).endswith("; dataset.path=FOLDER names a local copy") and "\n" not in str(error.value)


def test_preparing_rows_says_how_far_it_is_once_it_lasts(tmp_path, monkeypatch):
    told, now = [], [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Lease(tmp_path) as lease:
        attempt = Attempt(tmp_path, tmp_path, lease, lambda *said: told.append(said), "sft", "identity", tmp_path)

        def patch_model_(count, seconds):
            rows = []
            for row in attempt.over(range(count), "rows"):
                now[0] += seconds
                rows.append(row)
            return rows

        assert patch_model_(10, 0.1) == list(range(10)) and told == []
        assert patch_model_(10, 1.0) == list(range(10))
    assert told[0][0] == "sft: rows" and told[-1] == ("sft: rows", 10, 10)
    assert len(told) > 5 and [step for _, step, _ in told] == sorted(step for _, step, _ in told)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF_DIR / "dataset").glob("*.yaml")))
def test_every_dataset_can_be_chosen_by_name(name, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    path = [f"dataset.path={tmp_path / 'pairs.jsonl'}"] if name == "jsonl" else []
    gold = [] if name == "mini_tldr" else ["judge=none", "evaluation=preference"]
    done = at_once(f"dataset={name}", *path, *gold, f"output_dir={tmp_path}", "dry_run=true")
    assert done.returncode == (2 if name == "jsonl" else 0), done.stderr
