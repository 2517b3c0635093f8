"""Mirrors a list of runs to trackers, once or until the runs have ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from src.config.schema import Tracking
from src.errors import describe_failure
from src.tracking.mirror import Mirror, RunMirror
from src.tracking.run_list import RunList
from src.tracking.sink import Sink
from src.tracking.sweep_mirror import SweepMirror
from src.tracking.tensorboard_sink import TensorboardSink
from src.tracking.wandb_login import resolve_target
from src.tracking.wandb_sink import WandbSink

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def make_sinks(tracking: Tracking, output_dir: Path) -> list[Sink]:
    """Return the sinks that are switched on."""
    target = resolve_target(tracking.wandb)
    sinks: list[Sink] = [] if target is None else [WandbSink(output_dir, target)]
    return [*sinks, TensorboardSink(output_dir)] if tracking.tensorboard.enabled else sinks


class SinkMirror:
    """Mirrors listed runs to one sink, pass by pass, until it fails.

    stages: identities; when given, only runs that one of these stages belongs to are mirrored.
    """

    def __init__(self, run_list: RunList, sink: Sink, stages: Collection[str] = ()) -> None:
        self.run_list, self.sink, self.stages = run_list, sink, set(stages)
        self.failure: str | None = None
        self._runs: dict[str, RunMirror] = {}
        self._sweeps = [SweepMirror(run_list.sweep, sink)] if run_list.sweep and not stages else []

    def mirrors(self) -> list[Mirror]:
        """Return the mirrors of all runs that are listed now."""
        runs = [run for run in self.run_list.runs() if not self.stages or self.stages & set(run.stages.values())]
        for run in runs:
            if run.id not in self._runs:
                self._runs[run.id] = RunMirror(run, self.run_list.store, self.sink)
            self._runs[run.id].run = run  # a search by rungs lists it with the stages of its next rung
        return [*(self._runs[run.id] for run in runs), *self._sweeps]

    def advance(self, live: bool) -> None:
        """Bring the sink up to date. live: also with runs that are still being computed."""
        for mirror in self.mirrors():
            if not mirror.is_complete:
                self._attempt(partial(mirror.advance, live and self.sink.resumable))

    def close(self) -> None:
        """Close the runs that are not complete."""
        for mirror in (*self._runs.values(), *self._sweeps):
            self._attempt(mirror.close)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write to the sink unless it has failed before."""
        if self.failure is None:
            try:
                write()
            except Exception as error:
                log.exception("%s failed", self.sink.title)
                self.failure = f"{self.sink.title}: {describe_failure(error)}"


def watch(mirrors: Collection[SinkMirror], wait_for_end: Callable[[float], bool]) -> None:
    """Mirror until the runs have ended, then once more; or until every sink has failed.

    wait_for_end: waits up to that many seconds, and returns whether the runs have ended.
    """
    has_ended = False
    while any(mirror.failure is None for mirror in mirrors):
        for mirror in mirrors:
            mirror.advance(live=True)
        if has_ended:
            break
        has_ended = wait_for_end(POLL_SECONDS)
    for mirror in mirrors:
        mirror.close()
