"""What the tests of W&B have in common: running commands as one of its users, and reading what came of it."""

import json
import subprocess
import sys

import yaml

from tests.conftest import ROOT, environment


def shell(server=None, **changes):
    """Of a user of W&B; logged in when there is a server."""
    known = {name: value for name, value in environment().items() if not name.startswith("WANDB_")}
    return (
        known
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


def told(history):
    """The lines of metrics.jsonl in what W&B has."""
    rows = ({k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")} for row in history)
    return [row for row in rows if row]
