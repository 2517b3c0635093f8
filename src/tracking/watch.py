"""Mirrors the runs of a source to its sinks, once or until the runs have ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from src.config.schema import Tracking
from src.errors import describe_failure
from src.tracking.mirror import RunMirror
from src.tracking.sink import Sink
from src.tracking.sources import Source, SweepSource
from src.tracking.sweep_mirror import SweepMirror, sweep_run_id
from src.tracking.tensorboard_sink import TensorboardSink
from src.tracking.wandb_login import resolve_target
from src.tracking.wandb_sink import WandbSink

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def make_sinks(tracking: Tracking, output_dir: Path) -> list[Sink]:
    """Return the sinks that are switched on."""
    sinks: list[Sink] = []
    target = resolve_target(tracking.wandb)
    if target is not None:
        sinks.append(WandbSink(output_dir, target))
    if tracking.tensorboard.enabled:
        sinks.append(TensorboardSink(output_dir))
    return sinks


class SourceMirror:
    """Mirrors the runs of a source, pass by pass. A sink that fails is left alone; the others continue.

    stages: identities; when given, only runs that one of these stages belongs to are mirrored.
    """

    def __init__(self, source: Source, sinks: Collection[Sink], stages: Collection[str] = ()) -> None:
        self.source, self.sinks, self.stages = source, list(sinks), set(stages)
        self.failures: dict[str, str] = {}  # title of a sink -> why it failed
        self._mirrors: dict[tuple[str, str], RunMirror | SweepMirror] = {}

    def advance(self, live: bool) -> None:
        """Bring every sink up to date. live: also with runs that are still being computed."""
        for sink in list(self.sinks):
            try:
                for mirror in self.mirrors(sink):
                    if not mirror.is_complete and mirror.advance(live and sink.resumable):
                        log.info("%s: %s is complete", sink.title, mirror.run_id)
            except Exception as error:
                self._fail(sink, error)

    def mirrors(self, sink: Sink) -> list[RunMirror | SweepMirror]:
        """Return the mirrors of all runs that the source lists now."""
        mirrors: list[RunMirror | SweepMirror] = []
        for run in self.source.runs():
            if self.stages and self.stages.isdisjoint(run.stages.values()):
                continue
            mirror = self._mirrors.get((sink.name, run.id))
            if isinstance(mirror, RunMirror):
                mirror.run = run  # of a search by rungs: the next rung's stages
            else:
                mirror = self._mirrors[sink.name, run.id] = RunMirror(run, self.source.store, sink)
            mirrors.append(mirror)
        if isinstance(self.source, SweepSource) and not self.stages:
            key = sink.name, sweep_run_id(self.source.folder)
            if key not in self._mirrors:
                self._mirrors[key] = SweepMirror(self.source.folder, sink)
            mirrors.append(self._mirrors[key])
        return mirrors

    def close(self) -> None:
        """Close the runs that are not complete."""
        for (name, _), mirror in self._mirrors.items():
            for sink in self.sinks:
                if sink.name == name:
                    try:
                        mirror.close()
                    except Exception as error:
                        self._fail(sink, error)

    def _fail(self, sink: Sink, error: Exception) -> None:
        log.exception("%s failed", sink.title)
        self.failures[sink.title] = describe_failure(error)
        self.sinks.remove(sink)


def watch(mirror: SourceMirror, wait_for_end: Callable[[float], bool]) -> None:
    """Mirror until the runs have ended, then once more. Failures are in `mirror.failures`.

    wait_for_end: waits up to that many seconds, and returns whether the runs have ended.
    """
    has_ended = False
    while mirror.sinks:
        mirror.advance(live=True)
        if has_ended:
            break
        has_ended = wait_for_end(POLL_SECONDS)
    mirror.close()
