"""W&B gets what metrics.jsonl has, and never stops a run."""

import json
import re
import struct
import subprocess
import sys

from tests.conftest import ROOT, SMALL, environment, train

BLOCK = 32768


def records(path):
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def offline_history(folder):
    """Logged rows of an offline run, and the run."""
    from wandb.proto import wandb_internal_pb2

    rows, run = [], None
    for data in records(next(folder.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        elif record.WhichOneof("record_type") == "run":
            run = record.run
    return rows, run


def test_not_logged_in_means_offline_and_the_same_numbers(tmp_path):
    train("-m", *SMALL, "beta=0.2,0.4", "tracking=wandb", f"output_dir={tmp_path}", "sweep.name=tracked")
    runs = {p.name.rpartition("-")[2]: p for p in (tmp_path / "wandb").glob("offline-run-*")}
    stages = {p.parent.name: p for p in (tmp_path / "store").glob("*/*/metrics.jsonl")}
    assert runs.keys() == stages.keys() and len(runs) == 3
    for identity, metrics in stages.items():
        rows, run = offline_history(runs[identity])
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [{k.removeprefix("train/"): v for k, v in r.items() if k.startswith("train/")} for r in rows] == lines
        assert run.run_group == "tracked" and run.job_type in ("sft", "align")


def test_a_server_that_is_not_there_delays_but_never_stops_a_run(tmp_path):
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    done = subprocess.run(
        [sys.executable, "-m", "src.train", *SMALL, "tracking=wandb", f"output_dir={tmp_path}"],
        cwd=ROOT,
        env=environment() | unreachable,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("W&B cannot be reached", done.stdout + done.stderr)) == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    assert "aaaaaaaa" not in done.stdout + done.stderr


def test_a_client_that_cannot_even_start_never_stops_a_run(tmp_path):
    (tmp_path / "wandb").write_text("a file where W&B wants its folder")
    done = train(*SMALL, "tracking=wandb", f"output_dir={tmp_path}")
    assert "result:" in done.stdout
