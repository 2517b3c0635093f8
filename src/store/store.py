"""The store of results: one directory per stage identity, published by one rename; sweeps beside it. No torch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import DamagedFile, StageError, warn
from src.store.attempt import PROGRESS_FILE, Attempt, Report
from src.store.code_snapshot import revision
from src.store.files import (
    NumberedNames,
    find,
    fsync_tree,
    publish_folder,
    read_checksummed_json,
    read_json,
    read_versioned_json,
    remove,
    with_checksum,
    write_json,
)
from src.store.integrity import DONE, STAGE_FILE, WEIGHTS, WEIGHTS_REMOVED, describe_files, find_damage
from src.store.lease import Lease
from src.store.provenance import provenance

if TYPE_CHECKING:
    from src.planning.stage import Stage

RESULT_FILE = "result.json"  # of an evaluate stage: the measurements that points are compared by
QUALITY_FILE = "quality.json"  # beside it: quality per prompt, and which prompts select hyper-parameters
JUDGEMENTS_FILE = "judgements.jsonl"  # beside it, with a judge: verdict and reason for every prompt
VERDICTS_FILE = "verdicts.json"  # beside it, with a judge: the verdicts of this one and of further ones, for analyses
RUN_CONFIG_FILE = "run_config.json"  # beside stage.json: the resolved config of the run that computed the stage
SAMPLES_FILE = "samples.jsonl"  # of a generate stage
METRICS_FILE = "metrics.jsonl"  # of a stage that trains: one object per optimizer step; trackers are fed from it
CHECKPOINT_FILE = "trainer.json"  # of a checkpoint: step, digests of its files, what the save took
CHECKPOINTS = NumberedNames("step-", 8)  # of a stage that trains, by the step they were saved before
CAPABILITY_FILE = "capability.json"  # beside it, with capability=: scores of every document asked, and the SFT model's
VALIDATION_FILE = "validation.jsonl"  # of a stage that trains: one line per held-out row
COUNTS_FILE = "data.json"  # of a stage that trains or makes pairs: how many rows it has read, and dropped
JUDGE_FILE = "judge.json"  # of a stage of a further judge
FURTHER_JUDGE = "judge_"  # how the roles of stages that judge by judges.NAME begin, before NAME
# Roles of stages that need the SFT model alone, and their kinds; all other roles, but for that of further
# judges, are named as their kinds.
OF_SFT_MODEL = {"baseline": "generate", "sft_capability": "capability"}
SHARED_ROLES = ("sft", "candidates", "pairs", "reference", *OF_SFT_MODEL)  # of stages that points share, upstream first
RESULT_SCHEMA = 2  # of result.json and quality.json
# The files of an evaluate stage that must be whole for its result to count, where it has them.
RESULT_FILES = (RESULT_FILE, QUALITY_FILE, JUDGEMENTS_FILE, VERDICTS_FILE, CAPABILITY_FILE)
# The small files of a stage, which suffice to aggregate without the store.
SMALL_FILES = (DONE, STAGE_FILE, RUN_CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, SAMPLES_FILE, *RESULT_FILES)


def kind_of(role: str) -> str:
    """Return the kind of the stages of a role."""
    return "judge" if role.startswith(FURTHER_JUDGE) else OF_SFT_MODEL.get(role, role)


def sample_key(row: dict[str, Any]) -> tuple[int, int, int]:
    """Return the prompt of a row of samples.jsonl or judgements.jsonl, and which of its samples and turns it is."""
    return row["index"], row.get("sample", 0), row.get("turn", 1)


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json of an evaluate stage.

    Raises FileNotFoundError, DamagedFile when a measurement is missing, and ConfigError for another version's.
    """
    result = read_versioned_json(folder / RESULT_FILE, RESULT_SCHEMA)
    try:
        measured = [result["quality"], *(result["splits"][name] for name in ("selection", "reporting"))]
        measured += [result["kl"][name] for name in ("per_sequence", "per_token")]
        measured += [result[name] for name in ("reward_accuracy", "reward_margin", "response_tokens")]
        is_whole = isinstance(result["quality"]["metric"], str) and isinstance(result.get("judge"), dict | None)
        is_whole &= all(isinstance(entry[key], float | int | None) for entry in measured for key in ("value", "se"))
        is_whole &= all({"stage", "identity", "seconds", "tokens"} <= stage.keys() for stage in result["stages"])
    except (AttributeError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise DamagedFile(f"{folder / RESULT_FILE}: damaged, measurements are missing")
    return result


def partial_run_id(run: str, stop_fraction: float) -> str:
    """Return the identity of the run that takes the same steps as `run` but stops after that fraction of them."""
    return f"{run}@{stop_fraction!r}"


def full_run_id(identity: str) -> str:
    """Return the identity of the full run that a partial run is the start of; any other identity unchanged."""
    return identity.partition("@")[0]


@dataclass(frozen=True)
class StageName:
    """What names the directory of a stage in a store."""

    kind: str
    identity: str


class Store:
    """`<output_dir>/store/<stage>/<identity>/` with DONE inside, `<output_dir>/sweeps/<name>/` beside it."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir).absolute()
        self.root, self.sweeps = self.output_dir / "store", self.output_dir / "sweeps"

    def dir(self, stage: Stage | StageName) -> Path:
        return self.root / stage.kind / stage.identity

    def work(self, stage: Stage | StageName) -> Path:
        """Return where the stage is computed.

        Partial runs of one training share it, with lease and checkpoints: one of them is computed at a time, and
        resumes where a shorter one stopped.
        """
        return self.root / stage.kind / ".work" / full_run_id(stage.identity)

    def answers(self, judge: str, model: str, key: str) -> Path:
        """Return the folder of a judge model's answers: append-only files that all sweeps share.

        key: a digest of what tells the model from others, since `model` is shortened to be a folder's name.
        """
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", model).strip("._")[-60:]
        return self.root / "answers" / judge / f"{name}-{key}"

    def tokenized(self, key: str) -> Path:
        """Return where the tokens of one split are cached for every stage that reads it."""
        return self.root / "tokenized" / key

    def is_done(self, stage: Stage | StageName) -> bool:
        return (self.dir(stage) / DONE).exists()

    def has_weights(self, stage: Stage | StageName) -> bool:
        """Return whether the stage is done and its model was not removed since."""
        return self.is_done(stage) and not (self.dir(stage) / WEIGHTS_REMOVED).exists()

    def remove_weights(self, stage: Stage | StageName, unless: Callable[[], bool] = lambda: False) -> None:
        """Delete the model of a finished stage, not its measurements; a stage that needs the model recomputes it.

        unless: asked once the model is marked as removed, so that a reader that looks at the mark after it has begun
        is either seen here or computes the model again. True leaves the model, and takes the mark back unless it is
        that of a removal that was killed.
        """
        folder = self.dir(stage)
        if is_whole := self.has_weights(stage):
            write_json(folder / WEIGHTS_REMOVED, {"removed": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        if not unless():
            for path in find(folder, WEIGHTS):
                path.unlink(missing_ok=True)
        elif is_whole:
            (folder / WEIGHTS_REMOVED).unlink()

    def finished(self, kind: str, version: int, newest: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield (content of stage.json, content of DONE) of the newest finished stages of a kind, newest first.

        Those of another version are left out, whose inputs have other fields, and with a warning damaged ones.
        """
        by_time: list[tuple[float, Path]] = []
        for path in (self.root / kind).glob(f"*/{DONE}"):
            with contextlib.suppress(FileNotFoundError):  # moved away since
                by_time.append((path.stat().st_mtime, path.parent))
        for _, folder in sorted(by_time, reverse=True)[:newest]:
            try:
                description = read_json(folder / STAGE_FILE)
                if description.get("version") != version:
                    continue
                if damage := find_damage(folder, folder.name, names=(STAGE_FILE,)):
                    raise DamagedFile(damage)
                done = read_checksummed_json(folder / DONE)
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                warn(f"{error}; it is left out of the estimates")
                continue
            yield description, done

    def damage(self, stage: Stage | StageName, names: Collection[str] | None = None) -> str | None:
        """Return which artifact of a finished stage is damaged or missing, and how; None when none is.

        names: the files to look at, by default all. Weights that keep_checkpoints removed are not missing.
        """
        return find_damage(self.dir(stage), stage.identity, names)

    def set_aside(self, stage: Stage, reason: str) -> None:
        """Move the folder of a stage out of the way, replacing an older one there, and warn. reason: names the file."""
        aside = self.root / stage.kind / ".damaged" / stage.identity
        aside.parent.mkdir(exist_ok=True)
        remove(aside)
        os.rename(self.dir(stage), aside)
        warn(f"{reason}; {stage.label} is computed again (what was there is now in {aside})")

    def progress(self, stage: Stage | StageName) -> dict[str, Any] | None:
        """Return the last reported progress of a running stage; None when there is none."""
        try:
            return read_checksummed_json(self.work(stage) / PROGRESS_FILE)
        except (FileNotFoundError, DamagedFile):
            return None

    def begin(self, stage: Stage, lease: Lease, report: Report) -> Attempt:
        """Start an attempt in a fresh private directory under the stage's lease; unfinished ones are deleted."""
        work = self.work(stage)
        for entry in work.iterdir():
            if entry.name.startswith("attempt-"):
                shutil.rmtree(entry, ignore_errors=True)
        (work / PROGRESS_FILE).unlink(missing_ok=True)  # of a shorter run of the same training
        out = work / f"attempt-{lease.token}"
        out.mkdir()
        write_json(out / STAGE_FILE, stage.description)
        write_json(out / RUN_CONFIG_FILE, stage.run_config)
        checkpoints = work / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        names = stage.label, stage.identity
        return Attempt(out, checkpoints, lease, report, *names, self.output_dir, packages=stage.packages)

    def forget_other_upstream(self, stage: Stage) -> None:
        """Delete what an earlier attempt has left to resume from when it came of other weights, log-probs or pairs.

        Those of a stage upstream that is computed again, on a GPU, need not have the same bits. Call it before the
        stage is computed, under its lease.
        """
        upstream = {role: self._array_digests(up) for role, up in stage.upstream.items()}
        file, checkpoints = self.work(stage) / "upstream.json", self.work(stage) / "checkpoints"
        try:
            known = read_checksummed_json(file)["upstream"]
        except (FileNotFoundError, DamagedFile):
            known = None
        if known != upstream:
            if known is not None and any(checkpoints.iterdir()):
                warn(f"{stage.label} starts anew: what it reads has been computed again, with other bits")
                remove(checkpoints)
                checkpoints.mkdir()
            write_json(file, with_checksum({"upstream": upstream}))

    def _array_digests(self, stage: Stage) -> dict[str, Any]:
        files = read_checksummed_json(self.dir(stage) / DONE)["files"]
        return {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".arrow"))}

    def join_attempt(self, stage: Stage, out: Path) -> Attempt:
        """Return rank 0's attempt as the other ranks see it."""
        checkpoints = self.work(stage) / "checkpoints"
        return Attempt(out, checkpoints, None, lambda *_: None, stage.label, stage.identity, self.output_dir)

    def publish(self, stage: Stage, attempt: Attempt) -> None:
        """Make the artifacts visible: flush everything to disk, write DONE last, then rename once.

        Raises StageError when the folder of the attempt was deleted meanwhile: a library may have made it anew.
        """
        assert attempt.lease is not None
        attempt.lease.check()
        if not (attempt.out / STAGE_FILE).is_file():
            raise StageError(f"{attempt.out}: deleted while {stage.label} was computed; run the same command again")
        fsync_tree(attempt.out)
        done = {
            "stage": stage.kind,
            "identity": stage.identity,
            **attempt.duration(),
            "tokens": attempt.tokens,
            "validation_tokens": attempt.validation_tokens,
            "save_seconds": attempt.save_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "commit": revision()["commit"],
            **provenance(attempt.packages),
            "files": describe_files(attempt.out),
        }
        write_json(attempt.out / DONE, with_checksum(done))
        final = self.dir(stage)
        if os.path.lexists(final) and not self.is_done(stage):
            self.set_aside(stage, f"{final}: has no {DONE}, so that it is no finished stage")
        if (final / WEIGHTS_REMOVED).exists():
            old = attempt.out.with_name("without-weights")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        publish_folder(attempt.out, final)  # artifacts of one identity are equal, whoever computes them

    def clean_up_work_dir(self, stage: Stage | StageName) -> None:
        """Delete the work directory of a finished stage.

        A partial run leaves its checkpoint to longer runs, unless the full run is done already.
        """
        full_run = StageName(stage.kind, full_run_id(stage.identity))
        if self.is_done(full_run):
            self.discard_work_dir(full_run)

    def discard_work_dir(self, stage: Stage | StageName) -> None:
        """Delete the checkpoints that a stage, or a longer run of its training, would resume from."""
        shutil.rmtree(self.work(stage), ignore_errors=True)
