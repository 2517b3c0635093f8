"""Which stage of a plan to run next: first what most other stages need, then one point after the other."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.usage import KINDS

MAX_RETRIES = 1  # of a stage whose process was killed
_KINDS = tuple(reversed(KINDS))  # nearest to a point's result first
# Seconds of a stage, by role, before one of its role has finished; generate takes half of what align took.
_DEFAULT_SECONDS = {"evaluate": 0.5, "reference": 5.0, "baseline": 5.0, "sft": 30.0, "candidates": 60.0, "pairs": 5.0}
_DEFAULT_SECONDS |= {"capability": 60.0, "sft_capability": 60.0}
_OTHER_SECONDS = 1.0  # of a stage that judges
_MIN_FRACTION = 0.2  # of a running stage, from which its speed is extrapolated


class Schedule:
    """States of the stages a plan needs: waiting, running, done, failed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.waiting = {identity: stage for identity, stage in plan.stages.items() if identity in plan.needed}
        self.running: dict[str, Stage] = {}
        self.failures: dict[str, str] = {}  # stage identity -> why; a stage whose upstream failed is included
        self.completed: dict[str, float] = {}  # stage identity -> seconds it took in this process
        self._started: dict[str, float] = {}
        self._num_retries: Counter[str] = Counter()
        num_points = Counter(identity for stage_ids in plan.point_stages for identity in stage_ids)
        self._shared = {identity for identity, count in num_points.items() if count > 1}
        order = [plan.point_stages[index] for index in plan.start_order]
        last_point = {identity: n for n, stage_ids in enumerate(order) for identity in stage_ids}
        self._priority = {
            identity: (identity not in self._shared, last_point[identity], _KINDS.index(stage.kind))
            for identity, stage in self.waiting.items()
        }

    def next(self) -> Stage | None:
        """Move a stage whose upstream is done to `running` and return it; None when every stage has to wait."""
        ready = [
            identity
            for identity, stage in self.waiting.items()
            if not any(up.identity in self.waiting or up.identity in self.running for up in stage.upstream.values())
        ]
        if not ready:
            return None
        identity = min(ready, key=self._priority.__getitem__)
        self.running[identity] = self.waiting.pop(identity)
        self._started[identity] = time.monotonic()
        return self.running[identity]

    def done(self, stage: Stage) -> None:
        del self.running[stage.identity]
        self.completed[stage.identity] = time.monotonic() - self._started[stage.identity]

    def fail(self, stage: Stage, reason: str) -> None:
        """Fail a running stage, and with the same reason every stage downstream of it."""
        del self.running[stage.identity]
        self.failures[stage.identity] = f"{stage.label}: {reason}"
        # Upstream first, as in the plan: a requeued stage stands last, but its upstream is done.
        for identity, waiting in list(self.waiting.items()):
            if cause := next((up for up in waiting.upstream.values() if up.identity in self.failures), None):
                del self.waiting[identity]
                self.failures[identity] = self.failures[cause.identity]

    def requeue(self, stage: Stage) -> bool:
        """Move a running stage back to `waiting`; False when it has been retried MAX_RETRIES times."""
        if self._num_retries[stage.identity] == MAX_RETRIES:
            return False
        self._num_retries[stage.identity] += 1
        self.waiting[stage.identity] = self.running.pop(stage.identity)
        return True

    def postpone(self, stage: Stage) -> None:
        """Move a running stage that has stopped on request back to `waiting`."""
        self.waiting[stage.identity] = self.running.pop(stage.identity)

    def finished(self) -> bool:
        return not self.waiting and not self.running

    def point_counts(self) -> tuple[int, int, int, int]:
        """Return the numbers of points that are done, running, failed and waiting."""
        done = failed = running = 0
        for stage_ids in self.plan.point_stages:
            result = stage_ids[-1]
            if result in self.failures or result in self.plan.abandoned:
                failed += 1
            elif result in self.completed or result not in self.plan.needed:
                done += 1
            elif any(identity in self.running and identity not in self._shared for identity in stage_ids):
                running += 1
        return done, running, failed, len(self.plan.point_stages) - done - running - failed

    def seconds_left(self, num_workers: int, fractions: dict[str, float]) -> float | None:
        """Estimate the seconds until everything is done; None before one alignment has run far enough.

        fractions: identity of a running stage -> the fraction of it that is done.
        """
        now = time.monotonic()
        expected = {
            i: (now - self._started[i]) / fraction for i, fraction in fractions.items() if fraction > _MIN_FRACTION
        }
        seconds: dict[str, list[float]] = defaultdict(list)
        for identity, duration in (self.completed | expected).items():
            seconds[self.plan.stages[identity].role].append(duration)
        mean = {role: sum(values) / len(values) for role, values in seconds.items()}
        if "align" not in mean:
            return None
        mean = {"generate": mean["align"] / 2, **_DEFAULT_SECONDS, **mean}
        remaining = sum(mean.get(stage.role, _OTHER_SECONDS) for stage in self.waiting.values())
        running = ((mean.get(stage.role, _OTHER_SECONDS), fractions.get(i, 0.0)) for i, stage in self.running.items())
        remaining += sum(seconds * (1 - fraction) for seconds, fraction in running)
        return remaining / max(1, num_workers)
