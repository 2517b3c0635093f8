"""The process beside a run or sweep that syncs it to trackers, as the run sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import ConfigError, describe_failure
from src.planning.plan import Plan
from src.preemption import Interrupted
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import RunList, write_run_list
from src.tracking.wandb_login import base_url, resolve_target

FINISH_TIMEOUT = 60.0  # seconds that a run waits at its end for its trackers
INTERRUPT_TIMEOUT = 8.0  # the same after Ctrl-C or when the job is preempted


@dataclass
class SyncProcess:
    """Runs `python -m sweeps.wandb_sync --watch` from start() to the end of the `with` block.

    Nothing it does can fail the run: at the end it is given `timeout` seconds, and if a tracker is still incomplete,
    one warning names the command that uploads the rest. When this process is killed, its stdin closes and it ends too.
    """

    path: Path  # of the list of runs, which is read at the start
    log_file: Path
    stages: Collection[str] = ()  # identities; when given, only runs that one of these belongs to are synced
    # Upper bound in seconds of a random delay before the first request, so that many jobs do not contact a server
    # together.
    startup_jitter: float = 0.0
    timeout: float = FINISH_TIMEOUT
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _failure: str | None = field(default=None, init=False)  # why the process did not start

    def announce(self) -> bool:
        """Print where the runs are tracked. Returns whether they are."""
        runs = RunList(self.path)
        target, lines = resolve_target(runs.tracking.wandb), []
        if target is not None and target.mode == "online":
            lines.append(f"W&B: online, {target} ({base_url() or 'https://wandb.ai'})")
        elif target is not None:
            upload = f"after `wandb login`, `{self._upload}` uploads it"
            lines.append(f"W&B: offline, below {runs.output_dir}/wandb; {upload}")
        if runs.tracking.tensorboard.enabled:
            lines.append(f"TensorBoard: tensorboard --logdir {runs.output_dir}/tensorboard")
        for line in lines:
            print(line, flush=True)
        return bool(lines)

    def start(self) -> None:
        """Start the process, if a tracker is switched on and it is not started yet."""
        if self._process is not None or self._failure is not None:
            return
        try:
            self._start()
        except (OSError, ConfigError) as error:  # no folder for the log, no process, a list that cannot be read
            self._failure = describe_failure(error)

    def _start(self) -> None:
        if not self.announce():
            return
        options = ["--startup-jitter", str(self.startup_jitter), *(["--stages", *self.stages] if self.stages else [])]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.wandb_sync", "--watch", str(self.path), *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the run, which then ends this process
            )

    def __enter__(self) -> SyncProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        failure = self._finish(INTERRUPT_TIMEOUT if is_interrupted else self.timeout)
        if failure is not None:
            message = f"upload incomplete ({failure}). Nothing is lost: `{self._upload}` uploads the rest."
            print(f"warning: {message}", file=sys.stderr)

    def _finish(self, timeout: float) -> str | None:
        """Wait for the process to upload the rest. Returns why a tracker is incomplete, or None."""
        if self._process is None:
            return self._failure
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return f"not finished within {timeout:.0f} s"
        if code == 0:
            return None
        try:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            lines = []
        return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), f"exit code {code}")

    @property
    def _upload(self) -> str:
        is_list = self.path.suffix == ".json"  # of a single run; else it is a sweep's folder, perhaps deleted since
        return f"python -m sweeps.wandb_sync {RunList(self.path).output_dir if is_list else self.path}"


def sync_sweep(folder: SweepFolder, log_file: Path | None = None, **options: Any) -> SyncProcess:
    """Return the process for the runs of a sweep, which sweep.json must list when it starts."""
    return SyncProcess(folder.path.absolute(), log_file or folder.logs / "tracking.log", **options)


def sync_run(plan: Plan, store: Store) -> SyncProcess:
    """Return the process for the only point of a plan, which is listed for it below OUTPUT_DIR/tracking."""
    return SyncProcess(write_run_list(plan, store), store.output_dir / "tracking" / "sync.log")
