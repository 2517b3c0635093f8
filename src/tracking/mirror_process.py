"""The process beside a run or sweep that mirrors it to trackers, as the run sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from src.planning.plan import Plan
from src.preemption import Interrupted
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from src.tracking.sources import RunRecord, Source, SweepSource
from src.tracking.wandb_login import base_url, resolve_target

FINISH_TIMEOUT = 60.0  # seconds that a run waits at its end for its trackers
INTERRUPT_TIMEOUT = 8.0  # the same after Ctrl-C or when the job is preempted


class MirrorProcess:
    """Runs `python -m sweeps.wandb_sync --watch` from start() to the end of the `with` block.

    Nothing it does can fail the run: at the end it is given `timeout` seconds, and if a tracker is still incomplete one
    warning names the command that uploads the rest. The process ends by itself when this one is killed, for then its
    stdin closes.

    stages: identities; when given, only runs that one of these stages belongs to are mirrored. startup_jitter: upper
    bound in seconds of a random delay before the first request, so that many jobs do not contact a server together.
    """

    def __init__(
        self,
        source: Source,
        log_file: Path,
        stages: Collection[str] = (),
        startup_jitter: float = 0.0,
        timeout: float = FINISH_TIMEOUT,
    ) -> None:
        self.source, self.log_file, self.output_dir = source, log_file, source.store.output_dir
        self.stages, self.startup_jitter, self.timeout = stages, startup_jitter, timeout
        self._process: subprocess.Popen[str] | None = None

    @property
    def command(self) -> str:
        """The command that uploads what is missing."""
        folder = self.source.path if self.source.path.is_dir() else self.output_dir
        return f"python -m sweeps.wandb_sync {folder}"

    def announce(self) -> bool:
        """Print where the runs are tracked. Returns whether they are."""
        lines, tracking = [], self.source.tracking
        target = resolve_target(tracking.wandb)
        if target is not None and target.mode == "online":
            lines.append(f"W&B: online, {target} ({base_url() or 'https://wandb.ai'})")
        elif target is not None:
            lines.append(
                f"W&B: offline, below {self.output_dir}/wandb; after `wandb login`, `{self.command}` uploads it"
            )
        if tracking.tensorboard.enabled:
            lines.append(f"TensorBoard: tensorboard --logdir {self.output_dir}/tensorboard")
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        return bool(lines)

    def start(self) -> None:
        """Start mirroring, if any tracker is switched on and it is not started yet."""
        if self._process is not None or not self.announce():
            return
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        options = ["--until-stdin-closes", "--startup-jitter", str(self.startup_jitter)]
        with self.log_file.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.wandb_sync", "--watch", str(self.source.path), *options]
                + (["--stages", *self.stages] if self.stages else []),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C reaches the run, which then ends this process
            )

    def __enter__(self) -> MirrorProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        failure = self._finish(INTERRUPT_TIMEOUT if is_interrupted else self.timeout)
        if failure is not None:
            print(
                f"warning: upload incomplete ({failure}). Nothing is lost: `{self.command}` uploads the rest.",
                file=sys.stderr,
            )

    def _finish(self, timeout: float) -> str | None:
        """Wait for the process to upload what is left. Returns why a tracker is incomplete, or None."""
        if self._process is None:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return f"not finished within {timeout:.0f} s"
        lines = self.log_file.read_text(errors="replace").splitlines()
        return None if code == 0 else lines[-1] if lines else f"exit code {code}"


def mirror_sweep(folder: SweepFolder, log_file: Path | None = None, **options: Any) -> MirrorProcess:
    """Return the process for the runs of a sweep, which sweep.json must list when it starts."""
    return MirrorProcess(SweepSource(folder), log_file or folder.logs / "tracking.log", **options)


def mirror_run(plan: Plan, store: Store) -> MirrorProcess:
    """Return the process for a single run, whose stages are noted for it below OUTPUT_DIR/tracking."""
    record = RunRecord.write(plan, store)
    log_file = store.output_dir / "tracking" / "mirror.log"
    return MirrorProcess(record, log_file)
