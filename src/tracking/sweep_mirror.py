"""The run of a sweep in a tracker: its points from the start, and at its end tables, figures and the best points."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from src.store.store import full_run_id
from src.store.sweep_folder import SweepFolder
from src.tracking.sink import RunLocked, RunMetadata, RunWriter, Sink
from src.tracking.sync_state import SyncState

JOB_TYPE = "aggregate"


def sweep_run_id(folder: SweepFolder) -> str:
    """Return an id of the sweep's name and its points at full length: every search over them is the same run."""
    sweep = folder.read()
    runs = sorted(full_run_id(point["stages"]["align"]) for point in sweep["points"])
    return f"sweep-{hashlib.sha256(repr([sweep['name'], runs]).encode()).hexdigest()[:16]}"


class SweepMirror:
    """Keeps the run of a sweep in sync with its folder; complete once the sweep is aggregated."""

    def __init__(self, folder: SweepFolder, sink: Sink) -> None:
        self.folder, self.sink = folder, sink
        self.run_id = sweep_run_id(folder)
        self.state = SyncState.of(folder.output_dir, sink, self.run_id)
        self._writer: RunWriter | None = None

    @property
    def is_complete(self) -> bool:
        return self._is_aggregated() and self.state.is_synced(self._content())

    def advance(self, live: bool) -> bool:
        """Write what is new. Returns whether the run is complete."""
        is_aggregated = self._is_aggregated()
        is_synced = self._writer is None and self.state.is_synced(self._content())
        if is_synced or not (is_aggregated or live):
            return self.is_complete
        try:
            writer = self._writer or self._open()
        except RunLocked:
            return False
        if is_aggregated:
            self._complete(writer)
        return self.is_complete

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.finish(complete=False)

    def _is_aggregated(self) -> bool:
        return self.folder.read()["finished"] is not None and self.folder.report.exists()

    def _open(self) -> RunWriter:
        sweep = self.folder.read()
        tags = tuple(dict.fromkeys(point["setup"] for point in sweep["points"]))
        config = {name: sweep[name] for name in ("command", "code", "select", "search")}
        config["points"] = len(sweep["points"])
        self._writer = self.sink.open(RunMetadata(self.run_id, JOB_TYPE, sweep["name"], sweep["name"], tags, config))
        self._writer.add_files([self.folder.record], self.folder.path)
        return self._writer

    def _complete(self, writer: RunWriter) -> None:
        content = self._content()
        for path in sorted(self.folder.figures.glob("*.png")):
            writer.add_figure(f"figures/{path.stem}", path)
        with (self.folder.tables / "best.csv").open(newline="") as handle:
            header, *rows = csv.reader(handle)
        writer.add_table("tables/best", header, rows)  # the other tables are in the artifact
        writer.add_page("report", self.folder.report)
        writer.add_result(content, self._summary())
        name = re.sub(r"[^\w.-]+", "-", f"{self.folder.name}-results")
        writer.add_artifact(name, self.folder.results())
        writer.add_files([self.folder.record], self.folder.path)
        self._writer, url = None, writer.url
        writer.finish(complete=True)
        self.state.mark_synced(content, -1, url)

    def _summary(self) -> dict[str, Any]:
        states = [point["state"] for point in self.folder.read()["points"]]
        summary: dict[str, Any] = {f"points/{state}": states.count(state) for state in sorted(set(states))}
        best = yaml.safe_load(self.folder.best_yaml.read_text()) or {}
        for setup, methods in best.items():
            for method, row in methods.items():
                for name in ("beta", "lr", "quality_reporting", "quality_reporting_se"):
                    summary[f"best/{setup}/{method}/{name}"] = row[name]
        return summary

    def _content(self) -> str:
        """Return a digest of the results. The report is left out: it contains the time it was written."""
        digest = hashlib.sha256()
        for path in (self.folder.best_yaml, self.folder.points_csv):
            digest.update(_read(path))
        return digest.hexdigest()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
