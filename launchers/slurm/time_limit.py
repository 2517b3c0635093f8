"""How long before its time limit a job is told to stop: long enough to save a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from launchers.slurm.job_records import Submission
from launchers.slurm.options import EARLY_S, SlurmOptions
from src.errors import ConfigError
from src.planning.save_time import SaveTimes, seconds_to_stop
from src.planning.stage import Stage


def signal_delay(kind: str, stages: Iterable[Stage], options: SlurmOptions, times: SaveTimes) -> int:
    """Return the seconds before the time limit at which jobs of this kind that compute these stages get the signal.

    Raises ConfigError when that leaves them no time to compute.
    """
    # Points that one job computes at once save at once, to one disk.
    longest = max((times.seconds(stage) for stage in stages), default=0.0) * options.kinds[kind].points_at_once
    delay = max(options.signal_delay_s, math.ceil(seconds_to_stop(longest)) if longest else 0)
    if options.kinds[kind].timeout_min * 60 <= delay + EARLY_S:
        raise ConfigError(
            f"hydra.launcher: timeout_min={options.kinds[kind].timeout_min} is too short for {kind} jobs: a checkpoint "
            f"takes about {longest:.0f} s to save, so that the stop signal ({delay} s before) would arrive at job start"
        )
    return delay


def after_timeouts(
    delay: int, stages: Collection[str], known: Iterable[Submission], queued: Collection[str], timeout_min: int
) -> int:
    """Return twice the delay of an earlier job for one of the stages that ended without a word: its save was not done.

    stages: identities. At most half of the time limit; never less than `delay`.
    """
    earlier = [
        submission.signal_delay_s
        for submission in known
        for task in submission.tasks
        if task.job not in queued
        and any(identity in stages for _, identity in task.stages)
        and task.status().get("state") == "running"
    ]
    return max(delay, min(2 * max(earlier, default=0), timeout_min * 30))
