"""Upload to W&B what it does not have yet: `python -m sweeps.wandb_sync DIR`, for a sweep's folder or an output_dir.

The store is the truth, so nothing is uploaded twice and a second call finds nothing to do. With `--watch` the runs of
DIR are mirrored while they are computed, to every tracker they were started with: a run starts that beside itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from src.errors import ConfigError, StageError, report_errors
from src.progress import RunProgress
from src.tracking.sink import Sink
from src.tracking.sources import Source, open_source, sources_below
from src.tracking.wandb_login import logged_in
from src.tracking.watch import SourceMirror, make_sinks, watch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.wandb_sync", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo, or an output_dir")
    parser.add_argument("--project", help="W&B project; default: the one the runs were started with")
    parser.add_argument("--entity", help="W&B entity; default: the one the runs were started with, or yours")
    parser.add_argument("--watch", action="store_true", help="mirror until the sweep ends")
    parser.add_argument("--until-stdin-closes", action="store_true", help="with --watch, for runs: until the run ends")
    parser.add_argument("--stages", nargs="+", default=[], help="with --watch: only runs that have one of these stages")
    parser.add_argument("--startup-jitter", type=float, default=0.0, help="wait up to this many seconds first")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.until_stdin_closes:
            return mirror_beside_run(arguments.dir, arguments.stages, arguments.startup_jitter)
        if arguments.watch:
            source = open_source(arguments.dir)
            mirror = SourceMirror(source, _sinks(source, arguments.project, arguments.entity), arguments.stages)
            watch(mirror, lambda seconds: _wait_until_finished(source, seconds))
            _check(mirror)
        else:
            upload(sources_below(arguments.dir), arguments.project, arguments.entity)
    return 0


def upload(sources: list[Source], project: str | None, entity: str | None) -> None:
    """Upload all runs that are finished. Raises StageError when a tracker does not take them."""
    num_runs, num_synced, num_uploaded = 0, 0, 0
    with RunProgress() as report:
        for number, source in enumerate(sources):
            report("uploading", number, len(sources))
            mirror = SourceMirror(source, _sinks(source, project, entity))
            mirrors = [run for sink in mirror.sinks for run in mirror.mirrors(sink)]
            num_runs += len(mirrors)
            num_before = sum(run.is_complete for run in mirrors)
            mirror.advance(live=False)
            _check(mirror)
            num_synced += num_before
            num_uploaded += sum(run.is_complete for run in mirrors) - num_before
    print(f"{num_uploaded} of {num_runs} runs uploaded, {num_synced} were there")
    if num_rest := num_runs - num_synced - num_uploaded:
        print(f"{num_rest} runs are still in progress; rerun later to upload them")


def mirror_beside_run(path: Path, stages: list[str], startup_jitter: float) -> int:
    """Mirror to the trackers a run was started with until that run, which holds our stdin open, has ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # SLURM sends them to every process of a job
    os.nice(5)
    ended = threading.Event()
    threading.Thread(target=_wait_for_eof, args=[ended], daemon=True).start()
    ended.wait(random.uniform(0, startup_jitter))
    source = open_source(path)
    mirror = SourceMirror(source, make_sinks(source.tracking, source.store.output_dir), stages)
    watch(mirror, ended.wait)
    if not mirror.failures:
        return 0
    print("; ".join(f"{title}: {reason}" for title, reason in mirror.failures.items()), flush=True)
    # wandb would wait at exit for runs that its server does not take.
    os._exit(1)


def _wait_for_eof(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _wait_until_finished(source: Source, seconds: float) -> bool:
    if not source.is_finished:
        time.sleep(seconds)
    return source.is_finished


def _sinks(source: Source, project: str | None, entity: str | None) -> list[Sink]:
    """Return W&B, online, and what else the runs were started with. Raises ConfigError when nobody is logged in."""
    if not logged_in():
        if source.tracking.tensorboard.enabled and not source.tracking.wandb.enabled:
            return make_sinks(source.tracking, source.store.output_dir)
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY")
    wandb = replace(
        source.tracking.wandb,
        enabled=True,
        mode="online",
        project=project or source.tracking.wandb.project,
        entity=entity or source.tracking.wandb.entity,
    )
    return make_sinks(replace(source.tracking, wandb=wandb), source.store.output_dir)


def _check(mirror: SourceMirror) -> None:
    for title, reason in mirror.failures.items():
        raise StageError(f"{title} upload failed ({reason}); run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())
