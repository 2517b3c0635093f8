"""Whether and where W&B is told, and the process that tells it, seen from outside."""

from __future__ import annotations

import configparser
import json
import netrc
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from src.config.schema import Point, Tracking
from src.preemption import Interrupted
from src.store.files import read_json
from src.store.store import Store
from src.tracking.follower import TOLD
from src.tracking.mirror import Mirror
from src.tracking.runs import TrackedRun, of_sweep, runs_of
from src.tracking.session import Place
from src.tracking.sweep import FILE, SweepMirror

SHARE = 0.08  # of the time since it began, that is waited in the end for another run to be told
LEAST, MOST = 8.0, 120.0  # seconds, of that, and of all that is waited


class Following:
    """While points are computed inside, W&B is told of those that ask for it, by a process of its own.

    folder: of the sweep, or output_dir: what a later upload is of. delay: of how many seconds a random share is waited
    before the first word: many jobs that begin at once shall not ask at once. patience: seconds to wait in the end for
    each further run; a share of the time until then, when not given.
    """

    def __init__(
        self, store: Store, log_file: Path, folder: Path, delay: float = 0.0, patience: float | None = None
    ) -> None:
        self.store, self.log_file, self.folder = store, log_file, folder
        self.delay, self.patience = random.uniform(0, delay), patience
        self.begun = time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._why: str | None = None  # it does not work

    def points(self, points: Sequence[Point], of: set[str] | None = None) -> None:
        """Tell of these from now on. of: identities of the stages that are computed here, where not all are."""
        points = [point for point in points if point.tracking.wandb]
        place = place_of(points[0].tracking) if points else None
        if place is None:
            return
        runs = runs_of(points)
        if of is not None:
            runs = [run for run in runs if of & set(run.stages.values())]
        self._runs(place, runs)

    def finished_of(self, folder: Path) -> None:
        """Tell of all finished points of the sweep in this folder."""
        place = place_of(tracking_of(folder))
        if place is not None:
            self._runs(place, of_sweep(folder, self.store))

    def _runs(self, place: Place, runs: Sequence[TrackedRun]) -> None:
        missing = [run for run in runs if not Mirror(run, self.store, place).complete]
        if missing:
            self._tell(place, {"runs": [asdict(run) for run in missing]})

    def sweep(self, folder: Path, only_online: bool = False) -> None:
        """Tell of the sweep in this folder from now on."""
        place = place_of(tracking_of(folder))
        if only_online and place is not None and place.mode != "online":
            return
        if place is not None and not SweepMirror(folder, self.store, place).complete:
            self._tell(place, {"sweep": str(folder.absolute())})

    def elsewhere(self, points: Sequence[Point]) -> None:
        """Say what will be told of points that jobs compute, who do it themselves."""
        place = place_of(points[0].tracking)
        if place is not None:
            print(f"W&B: {_said(place, self.store, self.folder)}", flush=True)

    def _tell(self, place: Place, what: dict[str, Any]) -> None:
        if self._why is not None:
            return
        try:
            if self._process is None:
                print(f"W&B: {_said(place, self.store, self.folder)}", flush=True)
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"place": asdict(place), **what}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self._why = f"{error.strerror}: {error.filename or 'its process has ended'}"

    def _start(self) -> subprocess.Popen[str]:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a") as handle:
            return subprocess.Popen(
                [sys.executable, "-m", "src.tracking.follower", str(self.store.output_dir), str(self.delay)],
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for whoever computes, who then ends it
            )

    def __enter__(self) -> Following:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is computed any more: wait a little for it to tell the rest, and say so when W&B has not all."""
        hurry = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        failure = (self._end(LEAST, LEAST) if hurry else self._end(self.patience)) or self._why
        if failure:
            print(
                f"warning: W&B has not all of this ({failure}); the store has: `python -m sweeps.wandb_sync "
                f"{self.folder}` uploads the rest",
                file=sys.stderr,
            )

    def _end(self, patience: float | None, most: float | None = None) -> str | None:
        """Wait while it advances. Why W&B has not everything, if so."""
        if self._process is None:
            return None
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        ended = advanced = time.monotonic()
        if patience is None:
            patience = min(MOST, max(LEAST, SHARE * (ended - self.begun)))
        most = most or max(MOST, patience)
        told = -1
        while self._process.poll() is None:
            now = time.monotonic()
            if told != (told := self._lines().count(TOLD)):
                advanced = now
            if now - advanced > patience or now - ended > most:
                self._process.kill()
                return f"it did not take the rest within {now - ended:.0f} s"
            time.sleep(0.1)
        if self._process.returncode == 0:
            return None
        lines = self._lines().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def _lines(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


def tracking_of(folder: Path) -> Tracking:
    """What a sweep was started with; the default of sweeps that say nothing."""
    return Tracking(**read_json(folder / FILE).get("tracking", {}))


def place_of(tracking: Tracking) -> Place | None:
    """None when W&B is not to be told."""
    mode = tracking.mode
    if mode == "auto":
        said = _setting("mode") or ("online" if logged_in() else "offline")
        mode = {"run": "online", "dryrun": "offline"}.get(said, said)  # as W&B's client reads it
    if not tracking.wandb or mode not in ("online", "offline"):
        return None
    return Place(tracking.project, tracking.entity, mode)


def logged_in() -> bool:
    """Whether this user has a key for the server, as `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(_setting("base_url") or "https://api.wandb.ai").netloc
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _setting(name: str) -> str | None:
    """Of W&B's client: the variable, or what its own commands (`wandb login --host`, `wandb offline`) wrote down."""
    if said := os.environ.get(f"WANDB_{name.upper()}"):
        return said
    files = configparser.ConfigParser(interpolation=None)
    own = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        files.read([own / "settings", Path("wandb") / "settings"])
    return files.get("default", name, fallback=None)


def _said(place: Place, store: Store, folder: Path) -> str:
    where = place.project if place.entity is None else f"{place.entity}/{place.project}"
    if place.mode == "online":
        return f"online, {where} ({_setting('base_url') or 'https://wandb.ai'})"
    below = f"offline, below {store.output_dir}/wandb"
    return f"{below}; after `wandb login`, `python -m sweeps.wandb_sync {folder}` uploads it"
