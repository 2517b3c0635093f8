"""Syncs a list of runs to trackers, once or until the runs have ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from src.config.schema import Tracking
from src.errors import ConfigError, describe_failure
from src.tracking.runs import RunList
from src.tracking.sink import Sink
from src.tracking.sync import RunSync, SweepSync, Sync
from src.tracking.tensorboard_sink import tensorboard_sink
from src.tracking.wandb_login import resolve_target
from src.tracking.wandb_sink import wandb_sink

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def make_sinks(tracking: Tracking, output_dir: Path) -> list[Sink]:
    """Return the sinks that are switched on."""
    target = resolve_target(tracking.wandb)
    sinks = [] if target is None else [wandb_sink(output_dir, target)]
    return [*sinks, tensorboard_sink(output_dir)] if tracking.tensorboard.enabled else sinks


class SinkSync:
    """Syncs listed runs to one sink, pass by pass, until it fails.

    stages: identities; when given, only runs that one of these stages belongs to are synced.
    """

    def __init__(self, run_list: RunList, sink: Sink, stages: Collection[str] = ()) -> None:
        self.run_list, self.sink, self.stages = run_list, sink, set(stages)
        self.failure: str | None = None
        self._damaged: dict[str, str] = {}  # runs that cannot be read -> why; the others go on
        self._runs: dict[str, RunSync] = {}
        self._sweeps = [SweepSync(run_list.sweep, sink)] if run_list.sweep and not stages else []

    def listed(self) -> list[Sync]:
        """Return the runs that are listed now."""
        runs = [run for run in self.run_list.runs() if not self.stages or self.stages & set(run.stages.values())]
        for run in runs:
            if run.id not in self._runs:
                self._runs[run.id] = RunSync(run, self.run_list.store, self.sink)
            self._runs[run.id].run = run  # a search by rungs lists it with the stages of its next rung
        return [*(self._runs[run.id] for run in runs), *self._sweeps]

    @property
    def failures(self) -> list[str]:
        """Why the sink lacks runs."""
        return [*([] if self.failure is None else [self.failure]), *self._damaged.values()]

    def advance(self, live: bool, last: bool = False) -> None:
        """Bring the sink up to date, unless it has failed before.

        live: also with runs that are still being computed. last: close the runs that are not complete.
        """
        if self.failure is not None:
            return
        try:
            for sync in self.listed():
                if sync.run_id not in self._damaged and not sync.is_complete:
                    self._advance_run(sync, live and self.sink.resumable)
            if last:
                for run in self._runs.values():
                    run.close()
        except Exception as error:
            log.exception("%s failed", self.sink.title)
            self.failure = f"{self.sink.title}: {describe_failure(error)}"

    def _advance_run(self, sync: Sync, live: bool) -> None:
        try:
            sync.advance(live)
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:  # its files, or a value in them
            log.exception("%s: run %s failed", self.sink.title, sync.run_id)
            sync.close()
            self._damaged[sync.run_id] = f"{self.sink.title}: run {sync.run_id}: {describe_failure(error)}"


def watch(syncs: Collection[SinkSync], wait_for_end: Callable[[float], bool]) -> None:
    """Sync until the runs have ended, then once more; or until every sink has failed.

    wait_for_end: waits up to that many seconds, and returns whether the runs have ended.
    """
    has_ended = False
    while any(sync.failure is None for sync in syncs):
        for sync in syncs:
            sync.advance(live=True, last=has_ended)
        if has_ended:
            break
        has_ended = wait_for_end(POLL_SECONDS)
