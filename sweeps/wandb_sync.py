"""Upload to W&B what it does not have yet: `python -m sweeps.wandb_sync DIR`, for a sweep's folder or an output_dir.

The store is the truth, so nothing is uploaded twice and a second call finds nothing to do. With `--watch` the runs of
DIR are synced while they are computed, to the trackers they were started with: a run starts that beside itself.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

from src.errors import ConfigError, StageError, report_errors
from src.progress import RunProgress
from src.tracking.runs import RunList, run_lists_below
from src.tracking.sink import Sink
from src.tracking.wandb_login import logged_in
from src.tracking.watch import SinkSync, make_sinks, watch
from sweeps.arguments import ArgumentParser


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.wandb_sync", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo, or an output_dir")
    parser.add_argument("--project", help="W&B project; default: the one the runs were started with")
    parser.add_argument("--entity", help="W&B entity; default: the one the runs were started with, or yours")
    parser.add_argument("--watch", action="store_true", help="sync until the runs end, or the pipe on stdin closes")
    parser.add_argument("--stages", nargs="+", default=[], help="with --watch: only runs that have one of these stages")
    parser.add_argument("--startup-jitter", type=float, default=0.0, help="with --watch: wait up to this many seconds")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.watch:
            return watch_runs(RunList(arguments.dir), arguments.stages, arguments.startup_jitter)
        upload(run_lists_below(arguments.dir), arguments.project, arguments.entity)
    return 0


def upload(run_lists: list[RunList], project: str | None, entity: str | None) -> None:
    """Upload what is finished. Raises StageError when a tracker does not take it."""
    num_runs, num_synced, num_complete = 0, 0, 0
    failures: list[str] = []
    with RunProgress() as report:
        for number, run_list in enumerate(run_lists):
            report("uploading", number, len(run_lists))
            for sink in _upload_sinks(run_list, project, entity):
                sync = SinkSync(run_list, sink)
                is_synced = [run.is_complete for run in sync.listed()]
                sync.advance(live=False)
                if sync.failure is not None:
                    raise StageError(f"{sync.failure}; run the same command again to continue")
                failures += sync.failures
                num_runs += len(is_synced)
                num_synced += sum(is_synced)
                num_complete += sum(run.is_complete for run in sync.listed())
    print(f"{num_complete - num_synced} of {num_runs} runs uploaded, {num_synced} were there")
    if num_complete < num_runs:
        print(f"{num_runs - num_complete} runs are still in progress; rerun later to upload them")
    if failures:
        raise StageError("; ".join(failures))


def watch_runs(run_list: RunList, stages: list[str], startup_jitter: float) -> int:
    """Sync runs until they end, or until the process that started this one does: it holds our stdin open."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    ended = threading.Event()
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # SLURM sends them to every process of a job
        threading.Thread(target=_wait_for_eof, args=[ended], daemon=True).start()
    os.nice(5)
    ended.wait(random.uniform(0, startup_jitter))
    syncs = [SinkSync(run_list, sink, stages) for sink in make_sinks(run_list.tracking, run_list.output_dir)]
    watch(syncs, lambda seconds: run_list.is_finished or ended.wait(seconds))
    failures = [failure for sync in syncs for failure in sync.failures]
    if not failures:
        return 0
    print("; ".join(failures), flush=True)
    os._exit(1)  # at a normal exit, wandb would wait for runs that its server does not take


def _wait_for_eof(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _upload_sinks(run_list: RunList, project: str | None, entity: str | None) -> list[Sink]:
    """Return W&B, online, and what else the runs were started with. Raises ConfigError when nobody is logged in."""
    tracking = run_list.tracking
    wandb = tracking.wandb
    if logged_in():
        wandb = replace(wandb, project=project or wandb.project, entity=entity or wandb.entity)
        tracking = replace(tracking, wandb=replace(wandb, enabled=True, mode="online"))
    elif wandb.enabled or not tracking.tensorboard.enabled:
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY")
    return make_sinks(tracking, run_list.output_dir)


if __name__ == "__main__":
    sys.exit(main())
