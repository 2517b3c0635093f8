"""Which stage of a plan to run next: what most others wait for first, then points one after the other to their end."""

from __future__ import annotations

import time

from src.planning.plan import Plan
from src.planning.stage import Stage

RETRIES = 1  # of a stage whose process was killed


class Schedule:
    """States of the stages a plan needs: waiting, running, done, failed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.waiting = {identity: plan.stages[identity] for identity in plan.stages if identity in plan.needed}
        self.running: dict[str, Stage] = {}
        self.failures: dict[str, str] = {}  # stage identity -> why, those that only lack an upstream included
        self.completed: dict[str, float] = {}  # stage identity -> seconds here
        self._begun: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        order = {identity: n for n, own in enumerate(plan.point_stages) for identity in own}
        dependents: dict[str, int] = {}
        for own in plan.point_stages:
            for identity in own:
                dependents[identity] = dependents.get(identity, 0) + 1
        # A shared stage first; of a point's own stages, the earliest point's, nearest to its result.
        rank = {kind: n for n, kind in enumerate(("evaluate", "generate", "align", "reference", "sft"))}
        self._priority = {
            identity: (-(dependents[identity] > 1), order[identity], rank[stage.kind])
            for identity, stage in self.waiting.items()
        }

    def width(self) -> int:
        """No more workers than this can ever be busy at once."""
        return max(1, sum(result in self.waiting for result in self.plan.results))

    def next(self) -> Stage | None:
        """A stage whose upstream is there, now running; None when all must wait."""
        ready = [
            identity
            for identity, stage in self.waiting.items()
            if not any(up.identity in self.waiting or up.identity in self.running for up in stage.upstream.values())
        ]
        if not ready:
            return None
        identity = min(ready, key=self._priority.__getitem__)
        self.running[identity] = self.waiting.pop(identity)
        self._begun[identity] = time.monotonic()
        return self.running[identity]

    def done(self, stage: Stage) -> None:
        del self.running[stage.identity]
        self.completed[stage.identity] = time.monotonic() - self._begun[stage.identity]

    def fail(self, stage: Stage, reason: str) -> None:
        """Everything downstream fails with it, and names it; everything else goes on."""
        del self.running[stage.identity]
        self.failures[stage.identity] = f"{stage.label}: {reason}"
        while True:
            lost = {
                identity: next(
                    self.failures[up.identity] for up in waiting.upstream.values() if up.identity in self.failures
                )
                for identity, waiting in self.waiting.items()
                if any(up.identity in self.failures for up in waiting.upstream.values())
            }
            if not lost:
                return
            for identity, why in lost.items():
                del self.waiting[identity]
                self.failures[identity] = why

    def once_more(self, stage: Stage) -> bool:
        """Put a running stage back, unless that was done before."""
        self._tries[stage.identity] = self._tries.get(stage.identity, 0) + 1
        if self._tries[stage.identity] > RETRIES:
            return False
        self.waiting[stage.identity] = self.running.pop(stage.identity)
        return True

    def finished(self) -> bool:
        return not self.waiting and not self.running

    def failed_points(self) -> dict[str, str]:
        return {result: self.failures[result] for result in self.plan.results if result in self.failures}

    def point_counts(self) -> tuple[int, int, int, int]:
        """Points done, running, failed, waiting."""
        done = failed = running = 0
        for own in self.plan.point_stages:
            if own[-1] in self.failures or own[-1] in self.plan.abandoned:
                failed += 1
            elif own[-1] in self.completed or own[-1] not in self.plan.needed:
                done += 1
            elif own[-1] in self.running or any(i in self.running for i in own if self._priority.get(i, (0,))[0] == 0):
                running += 1
        return done, running, failed, len(self.plan.point_stages) - done - running - failed

    def seconds_left(self, workers: int, progress: dict[str, float]) -> float | None:
        """From the mean time of finished stages of each kind; None before there is any to go by.

        progress: running stage -> share of it that is done.
        """
        spent: dict[str, list[float]] = {}
        for identity, seconds in self.completed.items():
            spent.setdefault(self.plan.stages[identity].role, []).append(seconds)
        for identity, share in progress.items():
            if share > 0.2:
                spent.setdefault(self.plan.stages[identity].role, []).append(
                    (time.monotonic() - self._begun[identity]) / share
                )
        mean = {role: sum(values) / len(values) for role, values in spent.items()}
        if "align" not in mean:
            return None
        mean = {"generate": mean["align"] / 2, "evaluate": 0.5, "reference": 5.0, "baseline": 5.0, "sft": 30.0} | mean
        left = sum(mean[stage.role] for stage in self.waiting.values())
        left += sum(mean[stage.role] * (1 - progress.get(identity, 0.0)) for identity, stage in self.running.items())
        return left / max(1, workers)
