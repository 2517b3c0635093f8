"""A run in W&B, brought up to what the store has of it. Doing so twice changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.store.files import read_json
from src.store.store import (
    DONE,
    JUDGEMENTS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    STAGE_FILE,
    StageName,
    Store,
)
from src.tracking import METRICS_FILE, marks
from src.tracking.runs import TRACKED_FILE, TrackedRun
from src.tracking.session import About, Place, Session, Taken

STEP = "train/step"
COMPUTED = ("host", "slurm_job", "commit", "seconds", "tokens", "processes", "finished")  # of each stage, from DONE

# What is small of a stage, and enough to aggregate without the store.
KEPT = (
    *(DONE, STAGE_FILE, METRICS_FILE, SAMPLES_FILE),
    *(RESULT_FILE, QUALITY_FILE, JUDGEMENTS_FILE, TRACKED_FILE),
)


class Mirror:
    """Of a point, or of a stage that points share. `advance` opens it when there is something to show."""

    def __init__(self, tracked: TrackedRun, store: Store, place: Place) -> None:
        self.tracked, self.store, self.place = tracked, store, place
        self.session: Session | None = None
        self._file: Path | None = None  # metrics that were read, and how far
        self._offset = 0
        self._step = -1  # the last that W&B has

    @property
    def id(self) -> str:
        return self.tracked.id

    @property
    def name(self) -> str:
        return self.tracked.name

    @property
    def complete(self) -> bool:
        return marks.has(self.store, self.id, self.tracked.stages, self.place)

    def advance(self, live: bool) -> bool:
        """Log what is new; whether the run is complete in W&B. live: also of a run that is not done yet."""
        done = all(self.store.is_done(StageName(*stage)) for stage in self.tracked.stages.items())
        if not done and not live:
            return False
        rows = list(self._new_rows())
        if self.session is None and (rows or done):
            try:
                self._open()
            except Taken:
                self._file = None  # the rows are to be read again
                return self.complete
        for row in rows:
            if row["step"] > self._step:
                assert self.session is not None
                self._step = row["step"]
                self.session.run.log({STEP: row["step"], **{f"train/{k}": v for k, v in row.items() if k != "step"}})
        if done:
            self._conclude()
        return done

    def close(self) -> None:
        """Of a run that is not complete."""
        if self.session is not None:
            session, self.session = self.session, None
            session.end(complete=False)

    def _open(self) -> None:
        own = self.tracked
        config = {**own.config, "uses": own.uses, "stages": own.stages}
        about = About(own.id, own.job_type, own.name, own.group, own.tags, config)
        self.session = Session(about, self.place, self.store.output_dir)
        # Our own step: after a resume, lines that are there already must be neither refused nor doubled.
        run = self.session.run
        run.define_metric(STEP)
        run.define_metric("train/*", step_metric=STEP)
        self._step = int(run.summary.get(STEP, -1))

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        """Whole lines of the newest metrics that were not read yet."""
        kind = "align" if "align" in self.tracked.stages else next(iter(self.tracked.stages))
        file = self._newest(StageName(kind, self.tracked.stages[kind]))
        if file is None:
            return
        if file != self._file:
            self._file, self._offset = file, 0
        try:
            with file.open("rb") as handle:
                handle.seek(self._offset)
                text = handle.read()
        except FileNotFoundError:  # published, or removed with its attempt: the next look finds the other
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        yield from map(json.loads, whole.splitlines())

    def _newest(self, stage: StageName) -> Path | None:
        published = self.store.dir(stage) / METRICS_FILE
        if published.exists():
            return published
        attempts = list(self.store.work(stage).glob(f"attempt-*/{METRICS_FILE}"))
        return max(attempts, key=lambda path: path.stat().st_mtime_ns) if attempts else None

    def _conclude(self) -> None:
        session, self.session = self.session, None
        assert session is not None
        run, own = session.run, self.tracked
        folders = {kind: self.store.dir(StageName(kind, identity)) for kind, identity in own.stages.items()}
        result = own.stages.get("evaluate")
        if result is not None and run.summary.get("result") != result:
            run.log({"samples": _samples(folders)})
            run.summary.update({**_summary(folders), "result": result})
        done = {kind: read_json(folder / DONE) for kind, folder in folders.items()}
        computed = {kind: {name: said[name] for name in COMPUTED if said.get(name)} for kind, said in done.items()}
        run.config.update({"computed": computed}, allow_val_change=True)
        if session.url and own.uses:
            run.notes = "rests on " + ", ".join(f"[{role}]({session.url_of(i)})" for role, i in own.uses.items())
        session.keep((folder / name for folder in folders.values() for name in KEPT), self.store.root)
        url = session.url
        session.end(complete=True)
        marks.note(self.store, self.id, own.stages, self.place, url)


def _samples(folders: dict[str, Path]) -> Any:
    """Every prompt with its response, and what the judge said of it."""
    import wandb

    verdicts = {}
    file = folders["evaluate"] / JUDGEMENTS_FILE
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        verdicts[row["index"]] = row
    own, judged = ("index", "prompt", "response", "tokens", "finished"), ("baseline", "verdict", "reason")
    table = wandb.Table(columns=[*own, *judged])
    for line in (folders["generate"] / SAMPLES_FILE).read_text().splitlines():
        row = json.loads(line)
        said = verdicts.get(row["index"], {})
        table.add_data(*(row[name] for name in own), *(said.get(name) for name in judged))
    return table


def _summary(folders: dict[str, Path]) -> dict[str, Any]:
    """result.json's numbers by their path, as quality/value."""
    result = read_json(folders["evaluate"] / RESULT_FILE)
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                add(f"{prefix}/{name}" if prefix else name, each)
        elif isinstance(value, int | float | str):
            flat[prefix] = value

    add("", {name: value for name, value in result.items() if name not in ("stages", "point", "schema")})
    return flat
