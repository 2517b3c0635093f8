"""Runs commands as a user of W&B, and reads what trackers were sent."""

import json
import struct
import subprocess
import sys

import yaml

from tests.support.commands import ROOT, environment


def shell(server=None, **changes):
    """Return the environment of a W&B user, who is logged in when there is a server."""
    variables = {name: value for name, value in environment().items() if not name.startswith("WANDB_")}
    return (
        variables
        | {"NETRC": "/nowhere", "WANDB_CONFIG_DIR": "/nowhere"}
        | ({} if server is None else server.environment)
        | changes
    )


def read_yaml(path):
    return yaml.safe_load(path.read_text())


def run(server, *arguments, module="src.train", cwd=ROOT, **changes):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=shell(server, PYTHONPATH=str(ROOT), **changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics_of(out, kind, identity):
    text = (out / "store" / kind / identity / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def training_rows(history):
    """Return the rows of a W&B history that are training metrics, as metrics.jsonl has them."""
    rows = ({k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")} for row in history)
    return [row for row in rows if row]


BLOCK = 32768


def records(path):
    """Yield the records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if BLOCK - offset % BLOCK < 7:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def offline_history(folder):
    """Return the logged rows of an offline run, and the run."""
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


def scalars(folder):
    """Return tag -> [(step, value)] of a TensorBoard run, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
