"""One run of W&B's, as every mirror opens and ends it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SECONDS_TO_START, SECONDS_TO_FINISH = 15.0, 60.0  # for a server to answer


@dataclass(frozen=True)
class Place:
    """Where runs go."""

    project: str
    entity: str | None
    mode: str  # online | offline


@dataclass(frozen=True)
class About:
    """What W&B lists a run by."""

    id: str
    job_type: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]


class Taken(Exception):
    """Another process tells W&B of the run; so it need not be done here, for now."""


class Session:
    """A run that is open, in one process at a time. Raises Taken, and what stops W&B from working."""

    def __init__(self, about: About, place: Place, output_dir: Path) -> None:
        self._lock = _lock(output_dir / "wandb" / "open" / about.id)
        os.environ.setdefault("WANDB_SILENT", "true")  # what is wrong comes as an exception
        import wandb

        self.mode = place.mode
        self.run = wandb.init(
            project=place.project,
            entity=place.entity,
            mode=place.mode,  # type: ignore[arg-type]
            id=about.id,
            resume="allow",
            name=about.name,
            group=about.group,
            job_type=about.job_type,
            tags=list(about.tags),
            dir=str(output_dir),
            config=about.config,
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=SECONDS_TO_START,
                finish_timeout=SECONDS_TO_FINISH,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,  # it would describe this process, which only tells
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    @property
    def url(self) -> str | None:
        return self.run.url

    def url_of(self, identity: str) -> str | None:
        """Of another run of the project."""
        return self.url and f"{self.url.rpartition('/')[0]}/{identity}"

    def keep(self, files: Iterable[Path], root: Path) -> None:
        """Upload those of the files that are there, under their paths below root."""
        for file in files:
            if file.exists():
                self.run.save(file, base_path=root, policy="now")

    def end(self, complete: bool) -> None:
        """Raises when W&B does not take everything in time. Not complete: it is shown as failed until it is gone on
        with."""
        own = Path(self.run.dir).parent
        try:
            self.run.finish(exit_code=0 if complete else 1)
        finally:
            self._lock.close()
        if complete and self.mode == "online":
            shutil.rmtree(own, ignore_errors=True)  # W&B's files of what the store has, and W&B now too


def _lock(file: Path) -> IO[str]:
    """Held until it is closed, or this process ends however it does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = file.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise Taken(file.name) from None
    except OSError:  # a file system without locks
        pass
    return handle
