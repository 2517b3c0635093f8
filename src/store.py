"""Where everything is: one directory per stage identity, published whole by one rename; sweeps beside it. No torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from src import interruption
from src.config import ConfigError
from src.identity import run_of
from src.lease import Lease
from src.revision import revision

if TYPE_CHECKING:
    from src.plan import Stage

T = TypeVar("T")

DONE = "DONE"
STAGE_FILE = "stage.json"
TRIMMED = "WEIGHTS_REMOVED"
RESULT_FILE = "result.json"  # of an evaluate stage: what a point is compared by
QUALITY_FILE = "quality.json"  # beside it: the same prompt by prompt, and which prompts choose hyper-parameters
JUDGEMENTS_FILE = "judgements.jsonl"  # beside it, where there is a judge: verdict and reason of every prompt
SAMPLES_FILE = "samples.jsonl"  # of a generate stage
TRACKED_FILE = "tracked.json"  # of an evaluate stage: what W&B is told of the point
PROGRESS_FILE = "progress.json"  # beside the lease of a stage: how far it is

# (stage label, step, total): called as a stage advances.
Report = Callable[[str, int, int], None]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` whole: a reader sees the old text or the new, never half of it."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def is_full(folder: Path) -> bool:
    """Whether the disk under `folder` has less than a megabyte left."""
    return shutil.disk_usage(folder).free < 2**20


def sync(folder: Path) -> None:
    """Bring the content of every file to disk, so that a rename afterwards cannot show half of one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


@dataclass
class Attempt:
    """One try at a stage: where it writes, where it resumes from, and whom it tells."""

    out: Path  # private until published
    checkpoints: Path  # outlives the attempt; the next one resumes from it
    lease: Lease | None  # of the process that leads; others follow it and write nothing
    report: Report
    label: str
    identity: str
    output_dir: Path
    started: float = field(default_factory=time.time)
    spent_before: float = 0.0  # seconds of earlier attempts that a checkpoint carried over
    tokens: int = 0
    processes: int = 1  # that compute it together, one accelerator each where there are any
    _told: float = 0.0
    _first: int | None = None

    def step(self, step: int, total: int, interruptible: bool = True) -> None:
        """Say how far the stage is. Raises LeaseLost when another process has taken it over, and Interrupted when
        this one is asked to stop (unless the stage is not `interruptible` here: it saves itself first)."""
        if self._first is None:
            self._first = step
        self._tell(self.label, step, total, self._first, self.started, interruptible)

    def over(self, rows: Sequence[T], what: str) -> Iterator[T]:
        """The rows, saying how many are prepared if that lasts. Raises like `step`."""
        started = time.time()
        for number, row in enumerate(rows):
            if time.time() - started > 2:
                self._tell(f"{self.label}: {what}", number, len(rows), 0, started)
            yield row
        if time.time() - started > 2:
            self._tell(f"{self.label}: {what}", len(rows), len(rows), 0, started)

    def _tell(self, label: str, step: int, total: int, first: int, started: float, interruptible: bool = True) -> None:
        if self.lease is None:
            return
        self.lease.check()
        if interruptible and step < total and (reason := interruption.requested()):
            raise interruption.Interrupted(f"{label} stopped at {step}/{total}: {reason}")
        now = time.monotonic()
        if now - self._told >= 0.5 or step >= total:
            self._told = now
            if self.lease.held:
                progress = {
                    "label": label,
                    "step": step,
                    "total": total,
                    "first": first,  # where this attempt went on from
                    "started": started,
                    "now": time.time(),
                }
                write_json(self.lease.folder / PROGRESS_FILE, progress)
            self.report(label, step, total)

    @property
    def leads(self) -> bool:
        """Whether this process writes the artefacts; of several that train together, one does."""
        return self.lease is not None

    @property
    def seconds(self) -> float:
        return self.spent_before + time.time() - self.started


@dataclass(frozen=True)
class StageName:
    """Enough of a stage to find it in a store."""

    kind: str
    identity: str


class Store:
    """`<output_dir>/store/<stage>/<identity>/` with DONE inside, `<output_dir>/sweeps/<name>/` beside it."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir).absolute()
        self.root = self.output_dir / "store"

    def dir(self, stage: Stage | StageName) -> Path:
        return self.root / stage.kind / stage.identity

    def work(self, stage: Stage | StageName) -> Path:
        """Where it is being computed. The parts of a run share it, lease and checkpoints: one at a time is computed,
        and goes on from where a shorter one stopped."""
        return self.root / stage.kind / ".work" / run_of(stage.identity)

    @property
    def sweeps(self) -> Path:
        return self.output_dir / "sweeps"

    def sweep_dir(self, name: str) -> Path:
        return self.sweeps / name

    def answers(self, judge: str, model: str) -> Path:
        """What a model has answered as this judge: files that only grow, shared by all sweeps."""
        return self.root / "answers" / judge / re.sub(r"[^\w.-]+", "_", model)[-100:]

    def tokenised(self, key: str) -> Path:
        """Where the tokens of a part of the data are kept, whoever needs them."""
        return self.root / "tokenised" / f"{key}.safetensors"

    def is_done(self, stage: Stage | StageName) -> bool:
        return (self.dir(stage) / DONE).exists()

    def has_weights(self, stage: Stage) -> bool:
        """Done, and its model was not removed since."""
        return self.is_done(stage) and not (self.dir(stage) / TRIMMED).exists()

    def remove_weights(self, stage: Stage) -> None:
        """Keep what a finished stage measured, not its model; who needs the model again computes it again."""
        folder = self.dir(stage)
        if self.has_weights(stage):
            write_json(folder / TRIMMED, {"removed": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        for path in folder.glob("*.safetensors*"):
            path.unlink(missing_ok=True)

    def finished(self, kind: str, newest: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(fields of its identity, what DONE says) of the stages of a kind, the newest first."""
        found = [(done.stat().st_mtime, done) for done in (self.root / kind).glob(f"*/{DONE}")]
        for _, done in sorted(found, reverse=True)[:newest]:
            yield read_json(done.with_name(STAGE_FILE))["fields"], read_json(done)

    def artefacts(self, stage: Stage) -> Path:
        """The directory of a finished stage. Raises ConfigError when it was not made by this config."""
        folder = self.dir(stage)
        stored = read_json(folder / STAGE_FILE)
        if stored != stage.description:
            keys = ", ".join(_differences(stored, stage.description))
            raise ConfigError(
                f"{folder / STAGE_FILE} disagrees with this run in {keys}: move the folder away and run again"
            )
        return folder

    def progress(self, stage: Stage | StageName) -> dict[str, Any] | None:
        """How far a running stage is, as its process last said; None when it has not."""
        try:
            return read_json(self.work(stage) / PROGRESS_FILE)
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def begin(self, stage: Stage, lease: Lease, report: Report) -> Attempt:
        """A fresh private directory under the stage's lease; what an earlier attempt left half-written goes."""
        work = self.work(stage)
        for entry in work.iterdir():
            if entry.name.startswith("attempt-"):
                shutil.rmtree(entry, ignore_errors=True)
        (work / PROGRESS_FILE).unlink(missing_ok=True)  # of a shorter part of the run
        out = work / f"attempt-{lease.token}"
        out.mkdir()
        checkpoints = work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        return Attempt(out, checkpoints, lease, report, stage.label, stage.identity, self.output_dir)

    def follow(self, stage: Stage, out: Path) -> Attempt:
        """The attempt another process leads, as one that takes part sees it."""
        checkpoints = self.work(stage) / "checkpoints"
        return Attempt(out, checkpoints, None, lambda *_: None, stage.label, stage.identity, self.output_dir)

    def publish(self, stage: Stage, attempt: Attempt) -> None:
        """Make the artefacts visible: everything on disk, DONE last, then one rename."""
        assert attempt.lease is not None
        attempt.lease.check()
        write_json(attempt.out / STAGE_FILE, stage.description)
        sync(attempt.out)
        done = {
            "stage": stage.kind,
            "identity": stage.identity,
            "seconds": round(attempt.seconds, 3),
            "tokens": attempt.tokens,
            "processes": attempt.processes,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "commit": revision()["commit"],
        }
        write_json(attempt.out / DONE, done)
        final = self.dir(stage)
        if (final / TRIMMED).exists():
            old = attempt.out.with_name("trimmed")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        try:
            os.rename(attempt.out, final)
        except OSError:
            if not (final / DONE).exists():
                raise
            # Somebody published the same identity meanwhile; equal by construction.

    def clear_work(self, stage: Stage) -> None:
        """Of a finished stage. One that stopped early leaves its checkpoint to a longer one, unless the whole run is
        there already."""
        whole = StageName(stage.kind, run_of(stage.identity))
        if self.is_done(whole):
            self.forget(whole)

    def forget(self, stage: Stage | StageName) -> None:
        """Remove what a stage, or a longer part of its run, would go on from; without it that starts anew."""
        shutil.rmtree(self.work(stage), ignore_errors=True)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)]
    return [] if a == b else [prefix]
