"""The run of a sweep in a tracker: its points from the start, and at its end tables, figures and the best points."""

from __future__ import annotations

import csv
import hashlib
import re
from typing import Any

import yaml

from src.planning.identity import digest
from src.store.store import full_run_id
from src.store.sweep_folder import SweepFolder
from src.tracking.mirror import Mirror
from src.tracking.sink import RunMetadata, RunWriter, Sink

JOB_TYPE = "aggregate"


class SweepMirror(Mirror):
    """Mirrors the results of a sweep; complete once the sweep is aggregated."""

    def __init__(self, folder: SweepFolder, sink: Sink) -> None:
        sweep = folder.read()
        # Of the points at full length, so that every search over them is the same run.
        points = sorted(full_run_id(point["stages"]["align"]) for point in sweep["points"])
        super().__init__(f"sweep-{digest([sweep['name'], points])[:16]}", folder.output_dir, sink)
        self.folder = folder

    @property
    def is_complete(self) -> bool:
        return self._is_aggregated() and self.state.is_synced(self._content())

    def advance(self, live: bool) -> None:
        is_aggregated = self._is_aggregated()
        if self._writer is None and (self.state.is_synced(self._content()) or not (is_aggregated or live)):
            return
        writer = self._writer or self._create()
        if writer is not None and is_aggregated:
            self._write_result(writer)
            self._complete(self._content())

    def _is_aggregated(self) -> bool:
        return self.folder.read()["finished"] is not None and self.folder.report.exists()

    def _create(self) -> RunWriter | None:
        sweep = self.folder.read()
        tags = tuple(dict.fromkeys(point["setup"] for point in sweep["points"]))
        config = {name: sweep[name] for name in ("command", "code", "select", "search")}
        config["points"] = len(sweep["points"])
        writer = self._open(RunMetadata(self.run_id, JOB_TYPE, sweep["name"], sweep["name"], tags, config))
        if writer is not None:
            writer.add_files([self.folder.record], self.folder.path)
        return writer

    def _write_result(self, writer: RunWriter) -> None:
        for path in sorted(self.folder.figures.glob("*.png")):
            writer.add_figure(f"figures/{path.stem}", path)
        with (self.folder.tables / "best.csv").open(newline="") as handle:
            header, *rows = csv.reader(handle)
        writer.add_table("tables/best", header, rows)  # the other tables are in the artifact
        writer.add_page("report", self.folder.report)
        writer.add_result(self._content(), self._summary())
        writer.add_artifact(re.sub(r"[^\w.-]+", "-", f"{self.folder.name}-results"), self.folder.results())
        writer.add_files([self.folder.record], self.folder.path)

    def _summary(self) -> dict[str, Any]:
        states = [point["state"] for point in self.folder.read()["points"]]
        summary: dict[str, Any] = {f"points/{state}": states.count(state) for state in sorted(set(states))}
        for setup, methods in (yaml.safe_load(self.folder.best_yaml.read_text()) or {}).items():
            for method, row in methods.items():
                for name in ("beta", "lr", "quality_reporting", "quality_reporting_se"):
                    summary[f"best/{setup}/{method}/{name}"] = row[name]
        return summary

    def _content(self) -> str:
        """Return a digest of the results. The report is left out: it contains the time it was written."""
        files = [file for file in (self.folder.best_yaml, self.folder.points_csv) if file.exists()]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
