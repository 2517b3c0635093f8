"""Brings a run of a tracker up to what the store has of it. Doing so again changes nothing."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.store.files import read_json
from src.store.store import (
    DONE,
    JUDGEMENTS_FILE,
    METRICS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    RUN_CONFIG_FILE,
    SAMPLES_FILE,
    STAGE_FILE,
    StageName,
    Store,
)
from src.tracking.runs import TrackedRun
from src.tracking.sink import RunLocked, RunMetadata, RunWriter, Sink
from src.tracking.sync_state import SyncState

log = logging.getLogger(__name__)

COMPUTED = ("host", "slurm_job", "commit", "seconds", "tokens", "processes", "finished")  # entries of DONE shown
SAMPLE_COLUMNS = ("index", "prompt", "response", "tokens", "finished")
JUDGEMENT_COLUMNS = ("baseline", "verdict", "reason")

# The small files of a stage, which suffice to aggregate without the store.
SMALL_FILES = (
    *(DONE, STAGE_FILE, RUN_CONFIG_FILE, METRICS_FILE, SAMPLES_FILE),
    *(RESULT_FILE, QUALITY_FILE, JUDGEMENTS_FILE),
)


class Mirror(ABC):
    """Keeps one run of one sink in sync with what was computed."""

    def __init__(self, run_id: str, output_dir: Path, sink: Sink) -> None:
        self.run_id, self.sink = run_id, sink
        self.state = SyncState(output_dir, sink, run_id)
        self.last_step = self.state.last_step
        self._writer: RunWriter | None = None

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the sink has the run with its final result."""

    @abstractmethod
    def advance(self, live: bool) -> None:
        """Write what is new. live: also of what is still being computed."""

    def close(self) -> None:
        """Close the run before it is complete; a later mirror resumes it."""
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
        self.state.mark_synced(content, self.last_step)


class RunMirror(Mirror):
    """Mirrors a point or a shared stage. The run is created on its first metrics."""

    def __init__(self, run: TrackedRun, store: Store, sink: Sink) -> None:
        super().__init__(run.id, store.output_dir, sink)
        self.run, self.store = run, store
        self._metrics: Path | None = None  # the file that is read, and how far
        self._offset = 0

    @property
    def is_complete(self) -> bool:
        return self.store.is_done(self.run.result) and self.state.is_synced(self.run.stages)

    def advance(self, live: bool) -> None:
        done = self.run.done_stages(self.store)
        is_new = done is not None and not self.state.is_synced(done)
        rows = list(self._new_rows()) if live or is_new else []
        if not rows and not is_new:
            return
        writer = self._writer or self._create(done)
        if writer is None:
            self._offset = 0  # read the rows again in the next pass
            return
        for row in rows:
            if row["step"] > self.last_step:
                self.last_step = row.pop("step")
                writer.log(self.last_step, {f"train/{name}": value for name, value in row.items()})
        if done is not None and is_new:
            self._write_result(writer, done)
            self._complete(done)

    def _create(self, done: dict[str, str] | None) -> RunWriter | None:
        """Open the run as its last finished stage, or else the running attempt, describes it."""
        if done is not None:
            folder = self.store.dir(StageName(*list(done.items())[-1]))
        else:
            assert self._metrics is not None
            folder = self._metrics.parent
        try:
            metadata = self.run.metadata(folder)
        except FileNotFoundError:  # the attempt is being published
            return None
        return self._open(metadata)

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines of the metrics file that are not in the sink yet."""
        try:
            file = next((file for file in self.run.metrics_files(self.store) if file.exists()), None)
            if file is None:
                return
            if file != self._metrics:
                self._metrics, self._offset = file, 0
            with file.open("rb") as handle:
                handle.seek(self._offset)
                text = handle.read()
        except FileNotFoundError:  # the attempt is being published
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            row = json.loads(line)
            if row["step"] > self.last_step:
                yield row

    def _write_result(self, writer: RunWriter, done: dict[str, str]) -> None:
        folders = {kind: self.store.dir(StageName(kind, identity)) for kind, identity in done.items()}
        result = done.get("evaluate")
        if result is not None and not writer.has_result(result):
            rows = _samples(folders["generate"] / SAMPLES_FILE, folders["evaluate"] / JUDGEMENTS_FILE)
            writer.add_table("samples", (*SAMPLE_COLUMNS, *JUDGEMENT_COLUMNS), rows)
            summary = read_json(folders["evaluate"] / RESULT_FILE)
            writer.add_result(result, _flatten({k: v for k, v in summary.items() if k not in ("stages", "schema")}))
        records = {kind: read_json(folder / DONE) for kind, folder in folders.items()}
        computed = {kind: {key: row[key] for key in COMPUTED if row.get(key)} for kind, row in records.items()}
        writer.add_config({"stages": done, "computed": computed})
        files = [folder / name for folder in folders.values() for name in SMALL_FILES]
        writer.add_files([file for file in files if file.exists()], self.store.root)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return numbers and strings by their path, as `quality/value`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | str):
            flat[prefix + name] = value
    return flat


def _samples(samples: Path, judgements: Path) -> list[list[Any]]:
    """Return a row for every prompt: its response, and the judge's verdict on it if there is a judge."""
    verdicts = {row["index"]: row for row in _json_lines(judgements)} if judgements.exists() else {}
    rows = []
    for row in _json_lines(samples):
        verdict = verdicts.get(row["index"], {})
        rows.append([row[name] for name in SAMPLE_COLUMNS] + [verdict.get(name) for name in JUDGEMENT_COLUMNS])
    return rows


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, file.read_text().splitlines())
