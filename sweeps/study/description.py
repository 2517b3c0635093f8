"""study.json: what a study.zip was made from and with, and the digests of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import src
from src.errors import DamagedFile
from src.store.code_snapshot import code_digest, revision
from src.store.files import find, read_checksummed_json, read_json
from src.store.integrity import DONE, STAGE_FILE
from src.store.store import RESULT_FILE, RUN_CONFIG_FILE
from sweeps.study.contents import StudyContents

SCHEMA = 1  # of study.json


def describe_study(contents: StudyContents) -> dict[str, Any]:
    """Return study.json without the digests of its files.

    Equal sweeps that are packed by equal code give equal descriptions: nothing in it says when or where it was packed.
    """
    record, stages = contents.record, _Stages()
    for folder in contents.stages:
        stages.add(folder)
    snapshots = sorted(path.name for path in find(contents.folder.code, "*"))
    return {
        "schema": SCHEMA,
        "name": contents.folder.name,
        "command": record["command"],
        "points": {"all": contents.num_points, "done": contents.num_done},
        "finished": record["finished"],
        "code": {
            "version": src.__version__,
            "started_with": record.get("code"),  # commit, and whether files differed from it
            "commits": sorted(stages.commits),  # that stages were computed with
            "snapshots": snapshots,  # of the code that jobs ran
            "packed_with": {**revision(), "digest": code_digest()},
        },
        "versions": {name: sorted(numbers) for name, numbers in sorted(stages.versions.items())},
        "hardware": {"gpus": stages.gpus, "hosts": len(stages.hosts), "processes": max(stages.processes)},
        "models": stages.models,
        "data": stages.data,
        "judges": stages.judges,
    }


class _Stages:
    """What the stages of a study say of themselves, each entry once, in the order of the stages."""

    def __init__(self) -> None:
        self.commits, self.hosts, self.processes = set[str](), set[str](), {1}
        self.versions: dict[str, set[str]] = {}
        self.gpus: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []
        self.data: list[dict[str, Any]] = []
        self.judges: list[dict[str, Any]] = []

    def add(self, folder: Path) -> None:
        """Add what is recorded with a finished stage. Raises DamagedFile."""
        done, description = read_checksummed_json(folder / DONE), read_json(folder / STAGE_FILE)
        self.commits |= {done["commit"]} if done.get("commit") else set()
        self.hosts |= {done["host"]} if done.get("host") else set()
        self.processes.add(done.get("processes", 1))
        for name, number in done.get("versions", {}).items():
            self.versions.setdefault(name, set()).add(number)
        _add(self.gpus, done.get("gpu"))
        config: dict[str, Any] = {}
        if (folder / RUN_CONFIG_FILE).exists():
            config = read_json(folder / RUN_CONFIG_FILE)
        inputs = description.get("inputs", {})
        try:
            self._add_inputs(folder, inputs, config)
        except (AttributeError, KeyError, TypeError):
            raise DamagedFile(f"{folder / STAGE_FILE}: damaged or of another version, it has other inputs") from None

    def _add_inputs(self, folder: Path, inputs: dict[str, Any], config: dict[str, Any]) -> None:
        """Add models and data as the config names them, with what stands for their content in identities."""
        if isinstance(model := inputs.get("model"), dict):
            named = {key: config.get("model", {}).get(key) for key in ("name", "path", "revision")}
            _add(self.models, named | {"inputs": model})
        for data in (inputs.get("data"), (inputs.get("prompts") or {}).get("data")):
            if isinstance(data, dict):
                _add(self.data, {"name": config.get("dataset", {}).get("name"), "inputs": data})
        if isinstance(judge := inputs.get("judge"), dict):
            entry = {"as": inputs.get("name", "judge"), "inputs": judge}
            if folder.parent.name == "evaluate":
                usage = read_json(folder / RESULT_FILE).get("judge") or {}
                entry["models"] = usage.get("models", [])  # as the endpoint named them
            _add(self.judges, entry)


def _add(entries: list[dict[str, Any]], entry: dict[str, Any] | None) -> None:
    if entry is not None and entry not in entries:
        entries.append(entry)
