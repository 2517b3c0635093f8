"""The run of a sweep in W&B: its points from the beginning, and in the end what was best of them."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from src.store.files import read_json
from src.store.store import Store, full_run_id
from src.tracking import marks
from src.tracking.session import About, Place, Session, Taken

FILE = "sweep.json"
REPORT, BEST = "report.html", "best.yaml"
FOLDERS = ("tables", "figures")
JOB_TYPE = "aggregate"


class SweepMirror:
    """To be advanced like a point's mirror; done when the sweep has been concluded."""

    def __init__(self, folder: Path, store: Store, place: Place) -> None:
        self.folder, self.store, self.place = folder, store, place
        self.session: Session | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def id(self) -> str:
        """Of its name and points, whatever their rung: the same sweep is the same run wherever it is aggregated."""
        sweep = read_json(self.folder / FILE)
        said = repr([sweep["name"], sorted(full_run_id(point["stages"]["align"]) for point in sweep["points"])])
        return f"sweep-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    @property
    def complete(self) -> bool:
        return marks.has(self.store, self.id, self._content(), self.place)

    def advance(self, live: bool) -> bool:
        done = read_json(self.folder / FILE)["finished"] is not None and (self.folder / REPORT).exists()
        if self.session is None and (done or live):
            try:
                self._open()
            except Taken:
                return self.complete
        if done:
            self._conclude()
        return done

    def close(self) -> None:
        if self.session is not None:
            session, self.session = self.session, None
            session.end(complete=False)

    def _open(self) -> None:
        sweep = read_json(self.folder / FILE)
        points = sweep["points"]
        config = {name: sweep[name] for name in ("command", "code", "select", "search")} | {"points": len(points)}
        tags = tuple(dict.fromkeys(point["setup"] for point in points))
        about = About(self.id, JOB_TYPE, sweep["name"], sweep["name"], tags, config)
        self.session = Session(about, self.place, self.store.output_dir)
        self._keep(FILE)

    def _conclude(self) -> None:
        import wandb

        session, self.session = self.session, None
        assert session is not None
        states = [point["state"] for point in read_json(self.folder / FILE)["points"]]
        summary: dict[str, Any] = {f"points/{state}": states.count(state) for state in sorted(set(states))}
        best = yaml.safe_load((self.folder / BEST).read_text()) or {}
        for setup, methods in best.items():
            for method, row in methods.items():
                for name in ("beta", "lr", "quality_reporting", "quality_reporting_se"):
                    summary[f"best/{setup}/{method}/{name}"] = row[name]
        session.run.summary.update(summary)
        shown: dict[str, Any] = {
            f"figures/{path.stem}": wandb.Image(str(path)) for path in self._written("figures/*.png")
        }
        for path in self._written("tables/best.csv"):  # the others are in the artifact
            shown[f"tables/{path.stem}"] = _table(path)
        session.run.log({**shown, "report": wandb.Html(str(self.folder / REPORT), inject=False)})
        artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", f"{self.name}-results"), type="sweep")
        for name in (FILE, BEST, REPORT, "points.csv"):
            artifact.add_file(str(self.folder / name), name)
        for name in FOLDERS:
            artifact.add_dir(str(self.folder / name), name)
        session.run.log_artifact(artifact)
        self._keep(FILE, session)
        content, url = self._content(), session.url
        session.end(complete=True)
        marks.note(self.store, self.id, content, self.place, url)

    def _keep(self, name: str, session: Session | None = None) -> None:
        session = session or self.session
        assert session is not None
        session.keep([self.folder / name], self.folder)

    def _written(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(pattern))

    def _content(self) -> str:
        """Of what the aggregator has written."""
        said = hashlib.sha256()
        for name in (BEST, "points.csv"):  # the report says when it was written
            if (self.folder / name).exists():
                said.update((self.folder / name).read_bytes())
        return said.hexdigest()


def _table(path: Path) -> Any:
    import wandb

    with path.open(newline="") as handle:
        header, *rows = csv.reader(handle)
    return wandb.Table(columns=header, data=rows)
