"""Brings a run of a tracker up to what the store has of it. Doing so again changes nothing."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import yaml

from src.errors import DamagedFile
from src.planning.content import digest
from src.store.files import read_bytes, read_json, read_jsonl, write_json
from src.store.store import (
    DONE,
    JUDGEMENTS_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    SMALL_FILES,
    StageName,
    Store,
    full_run_id,
    kind_of,
    sample_key,
)
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import TrackedRun
from src.tracking.sink import RunLocked, RunMetadata, RunWriter, Sink, tracked_name

log = logging.getLogger(__name__)

SWEEP_JOB_TYPE = "aggregate"
COMPUTED = ("host", "slurm_job", "commit", "seconds", "tokens", "processes", "finished")  # entries of DONE shown
SAMPLE_COLUMNS = (
    "index",
    "sample",
    "turn",
    "prompt",
    "response",
    "tokens",
    "finished",
    "baseline",
    "verdict",
    "reason",
)


class Sync(ABC):
    """Keeps one run of one sink in sync with what was computed.

    What the sink has confirmed is noted below OUTPUT_DIR/tracking.
    """

    def __init__(self, run_id: str, output_dir: Path, sink: Sink) -> None:
        self.run_id, self.sink = run_id, sink
        self._state_file = output_dir / "tracking" / sink.name / f"{run_id}.json"
        self.last_step = self._state().get("last_step", -1)  # the last training step that the sink has; -1 for none
        self._writer: RunWriter | None = None

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the sink has the run with its final result."""

    @abstractmethod
    def advance(self, live: bool) -> None:
        """Write what is new. live: also of what is still being computed."""

    def close(self) -> None:
        """Close the run before it is complete; a later process resumes it."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.finish(complete=False)

    def _open(self, metadata: RunMetadata) -> RunWriter | None:
        """Create or resume the run; None while another process has it open."""
        try:
            self._writer = self.sink.open(metadata)
        except RunLocked:
            return None
        self.last_step = max(self.last_step, self._writer.last_step)
        return self._writer

    def _complete(self, content: Any) -> None:
        """Close the run and note that the sink has `content` of it."""
        assert self._writer is not None
        writer, self._writer = self._writer, None
        writer.finish(complete=True)
        log.info("%s: %s is complete", self.sink.title, self.run_id)
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._state_file, {"target": self.sink.target, "content": content, "last_step": self.last_step})

    def _is_synced(self, content: Any) -> bool:
        """Return whether the sink has exactly this content of the run."""
        return self._state().get("content") == content

    def _state(self) -> dict[str, Any]:
        """Return what the sink has; nothing when that was noted for another target."""
        try:
            state = read_json(self._state_file)
        except (FileNotFoundError, DamagedFile):  # what is written again replaces what the sink has
            state = {}
        return state if self.sink.target in ("", state.get("target")) else {}


class RunSync(Sync):
    """Syncs a point or a shared stage. The run is created on its first metrics."""

    def __init__(self, run: TrackedRun, store: Store, sink: Sink) -> None:
        super().__init__(run.id, store.output_dir, sink)
        self.run, self.store = run, store

    @property
    def is_complete(self) -> bool:
        return self.store.is_done(self.run.result) and self._is_synced(self.run.stages)

    def advance(self, live: bool) -> None:
        done = self.run.done_stages(self.store)
        is_new = done is not None and not self._is_synced(done)
        if not (live or is_new):
            return
        try:
            file = next((file for file in self.run.metrics_files(self.store) if file.exists()), None)
            rows = self._new_rows(file) if file else []
            # The last finished stage, or else the running attempt, describes the run.
            if done is not None and (rows or is_new):
                folder = self.store.dir(StageName(*list(done.items())[-1]))
            elif file is not None and rows:
                folder = file.parent
            else:
                return
            metadata = self.run.metadata(folder)
        except FileNotFoundError:  # the attempt is being published
            return
        writer = self._writer or self._open(metadata)
        if writer is None:
            return
        for row in rows:
            if row["step"] > self.last_step:
                self.last_step = row.pop("step")
                writer.log(self.last_step, {tracked_name(name): value for name, value in row.items()})
        if done is not None and is_new:
            self._write_result(writer, done)
            self._complete(done)

    def _new_rows(self, metrics_file: Path) -> list[dict[str, Any]]:
        """Return the complete lines of steps that are not in the sink yet; line n, from 0, is of step n."""
        lines, rows = read_bytes(metrics_file).split(b"\n")[:-1], []
        for number, line in enumerate(lines[self.last_step + 1 :], start=self.last_step + 2):
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    raise TypeError("its step is no number")
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedFile(f"{metrics_file}, line {number}: damaged ({error})") from None
            rows.append(row)
        return rows

    def _write_result(self, writer: RunWriter, done: dict[str, str]) -> None:
        folders = {role: self.store.dir(StageName(kind_of(role), identity)) for role, identity in done.items()}
        result = done.get("evaluate")
        if result is not None and result != writer.result:
            columns, rows = _samples(folders["generate"] / SAMPLES_FILE, folders["evaluate"] / JUDGEMENTS_FILE)
            writer.add_table("samples", columns, rows)
            summary = read_json(folders["evaluate"] / RESULT_FILE)
            writer.add_result(result, _flatten({k: v for k, v in summary.items() if k not in ("stages", "schema")}))
        records = {kind: read_json(folder / DONE) for kind, folder in folders.items()}
        computed = {kind: {key: row[key] for key in COMPUTED if row.get(key)} for kind, row in records.items()}
        writer.add_config({"stages": done, "computed": computed})
        files = [folder / name for folder in folders.values() for name in SMALL_FILES]
        writer.add_files([file for file in files if file.exists()], self.store.root)


class SweepSync(Sync):
    """Syncs the results of a sweep once it is aggregated: tables, figures and the best points."""

    def __init__(self, folder: SweepFolder, sink: Sink) -> None:
        sweep = folder.read()
        # Of the points at full length, so that every search over them is the same run.
        points = sorted(full_run_id(point["stages"]["align"]) for point in sweep["points"])
        super().__init__(f"sweep-{digest([sweep['name'], points])[:16]}", folder.output_dir, sink)
        self.folder = folder

    @property
    def is_complete(self) -> bool:
        content = self._content()
        return content is not None and self._is_synced(content)

    def advance(self, live: bool) -> None:
        content = self._content()
        if content is None or self._is_synced(content):
            return
        sweep = self.folder.read()
        tags = tuple(dict.fromkeys(point["setup"] for point in sweep["points"]))
        config = {name: sweep[name] for name in ("command", "code", "select", "search")}
        config["points"] = len(sweep["points"])
        writer = self._open(RunMetadata(self.run_id, SWEEP_JOB_TYPE, sweep["name"], sweep["name"], tags, config))
        if writer is not None:
            self._write_result(writer, content)
            self._complete(content)

    def _write_result(self, writer: RunWriter, content: str) -> None:
        for path in sorted(self.folder.figures.glob("*.png")):
            writer.add_media(f"figures/{path.stem}", path)
        if (best := self.folder.tables / "best.csv").exists():  # not where no point is done
            with best.open(newline="", encoding="utf-8") as handle:
                header, *rows = csv.reader(handle)
            writer.add_table("tables/best", header, rows)  # the other tables are in the artifact
        writer.add_media("report", self.folder.report)
        writer.add_result(content, self._summary())
        writer.add_artifact(re.sub(r"[^\w.-]+", "-", f"{self.folder.name}-results"), self.folder.results())
        writer.add_files([self.folder.record], self.folder.path)

    def _summary(self) -> dict[str, Any]:
        states = [point["state"] for point in self.folder.read()["points"]]
        summary: dict[str, Any] = {f"points/{state}": states.count(state) for state in sorted(set(states))}
        for setup, methods in (yaml.safe_load(self.folder.best_yaml.read_text(encoding="utf-8")) or {}).items():
            for method, row in methods.items():
                for name in ("beta", "lr", "quality_reporting", "quality_reporting_se"):
                    summary[f"best/{setup}/{method}/{name}"] = row[name]
        return summary

    def _content(self) -> str | None:
        """Return a digest of the results, None before the sweep is aggregated.

        The report is left out: it contains the time it was written.
        """
        if self.folder.read()["finished"] is None or not self.folder.report.exists():
            return None
        files = [file for file in (self.folder.best_yaml, self.folder.points_csv) if file.exists()]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return numbers and strings by their path, as `quality/value`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | str):
            flat[prefix + name] = value
    return flat


def _samples(samples: Path, judgements: Path) -> tuple[list[str], list[list[Any]]]:
    """Return columns, and a row for every sample: the response, and the judge's verdict on it if there is a judge.

    Where a prompt has several samples, `sample` is a column.
    """
    verdicts = {sample_key(row): row for row in read_jsonl(judgements, ("index",))} if judgements.exists() else {}
    rows = [verdicts.get(sample_key(row), {}) | row for row in read_jsonl(samples, ("index",))]
    columns = [name for name in SAMPLE_COLUMNS if name not in ("sample", "turn") or any(name in row for row in rows)]
    return columns, [[row.get(name) for name in columns] for row in rows]
