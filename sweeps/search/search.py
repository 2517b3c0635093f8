"""Run a sweep: all points to their end at once, or rung by rung (sweeps.search.successive_halving).

The progress is read from the store at every call, so the same command resumes wherever it was stopped.
"""

from __future__ import annotations

import sys

from launchers.protocol import PlanLauncher
from src.errors import PointFailure
from src.planning.cost import Cost
from src.planning.plan import Plan, make_plan
from src.preflight import check_hub, check_key, check_packages
from src.store.retention import apply_retention_after_rung, best_results_in_store
from src.store.store import StageName, Store, read_result
from src.store.sweep_folder import SweepFolder
from src.tracking.sync_process import SyncProcess, sync_sweep
from sweeps.search.record import SweepRecord
from sweeps.search.successive_halving import RungState, dry_run_table, entry_rungs, promote, with_stop

FINALIZE = "sweeps.finalize:finalize"  # called by the last job of a sweep, or here when no jobs are submitted


class Search:
    """The plan of a sweep and the rungs in which it is run; a full grid has one rung."""

    def __init__(self, plan: Plan, store: Store) -> None:
        """Read from the store where each point enters. plan: of all points, each trained to its end."""
        self.full_plan, self.store, self.points = plan, store, plan.points
        options = plan.points[0].sweep
        self.is_halving, self.keep_fraction = options.search == "successive_halving", options.keep_fraction
        self.rungs = options.rungs if self.is_halving else [1.0]
        partial_plans = [make_plan([with_stop(p, stop) for p in plan.points], store) for stop in self.rungs[:-1]]
        self.results = [rung_plan.results for rung_plan in (*partial_plans, plan)]  # rung -> point -> identity
        self.entry_rung = [0] * len(plan.points)
        if self.is_halving:
            full, first = ([self._quality(i) is not None for i in self.results[rung]] for rung in (-1, 0))
            self.entry_rung = entry_rungs(plan.points, full, first, len(self.rungs) - 1)
        self.rung_of = list(self.entry_rung)
        self._warned = False

    def text(self) -> str:
        """Return what would run, for `dry_run=true`: the plan of the next rung, and the expected size of the others."""
        for rung in range(len(self.rungs)):
            plan = self._plan({})
            if plan.needed or rung == len(self.rungs) - 1:
                break
            self._promote(rung)
        parts = [plan.text(), Cost(plan, self.store).text()]
        if (state := self._state(rung)) is not None:
            if plan.needed:
                anew = ", as if its points were trained from the start" if rung else ""
                parts.append(f"\nabove: rung {rung + 1} of {len(self.rungs)}{anew}")
            parts.append(dry_run_table(self.points, state))
        return "\n".join(parts)

    def run(self, launcher: PlanLauncher, name: str, command: str) -> None:
        """Hand one rung after the other to the launcher, then aggregate; return early when jobs do the rest.

        Raises SweepFailed when points failed.
        """
        folder = SweepFolder(self.store.sweeps / name)
        with sync_sweep(folder) as sync:
            self._run(launcher, name, command, sync)

    def _run(self, launcher: PlanLauncher, name: str, command: str, sync: SyncProcess) -> None:
        num_completed, failures = self._load_progress(SweepFolder(self.store.sweeps / name))
        last = len(self.rungs) - 1
        for rung in range(len(self.rungs)):
            plan = self._plan(failures)
            record = SweepRecord(self.store, plan, name, command, self._state(rung), dict(failures))
            if rung == last or (rung >= num_completed and plan.needed):
                new_failures = self._run_rung(launcher, record, rung, sync)
                if new_failures is None:
                    if rung < last:
                        print(f"when rung {rung + 1} is done, rerun the same command to start rung {rung + 2}")
                    return
                failures |= new_failures
            if rung < last:
                self._finish_rung(rung, plan)
        from sweeps.finalize import finalize  # pandas: only when there is something to aggregate

        sync.start()
        finalize(record.folder.path, failures)

    def _run_rung(
        self, launcher: PlanLauncher, record: SweepRecord, rung: int, sync: SyncProcess
    ) -> dict[str, PointFailure] | None:
        """Return the failures of the rung; None when jobs compute it and finalize the sweep."""
        plan = record.plan
        self._check(plan, launcher)
        if self.is_halving and plan.needed:
            count, stop = self.rung_of.count(rung), self.rungs[rung]
            print(
                f"{record.name}: rung {rung + 1} of {len(self.rungs)}: {count} points to {100 * stop:g} % of "
                "their steps",
                flush=True,
            )
        record.start()
        if launcher.runs_in_process:
            sync.start()
        elif plan.needed:
            sync.announce()
        failures = launcher.launch_plan(plan, record.folder, FINALIZE)
        if failures is None:
            record.submitted()
        return failures

    def _plan(self, failures: dict[str, PointFailure]) -> Plan:
        """Return the plan of the current rung: each point truncated to its rung, without those that failed before."""
        if not self.is_halving:
            return self.full_plan
        stops = [self.rungs[reached] for reached in self.rung_of]
        plan = make_plan([with_stop(p, stop) for p, stop in zip(self.points, stops, strict=True)], self.store)
        plan.abandoned = set(failures)
        plan.refresh(self.store)
        return plan

    def _check(self, plan: Plan, launcher: PlanLauncher) -> None:
        """Raise ConfigError for what would fail later, before anything is recorded."""
        if plan.needed:
            check_packages(plan.points)
            check_key(plan.points)
        if plan.needed and not self._warned:
            self._warned = True
            for warning in check_hub(plan.points):
                print(f"warning: {warning}", file=sys.stderr)
        launcher.check(plan)

    def _promote(self, rung: int) -> None:
        quality = [self._quality(identity) for identity in self.results[rung]]
        self.rung_of = promote(self.points, self.rung_of, quality, rung, self.keep_fraction)

    def _finish_rung(self, rung: int, plan: Plan) -> None:
        """Promote the better points, and delete what only the promotion of the others would have needed."""
        at_rung = [i for i, reached in enumerate(self.rung_of) if reached == rung]
        self._promote(rung)
        rejected = {self.results[rung][i] for i in at_rung if self.rung_of[i] == rung}
        keep, best = plan.points[0].keep_checkpoints, best_results_in_store(self.store)
        apply_retention_after_rung(self.store, plan.stages_by_role, keep, rejected, best)

    def _quality(self, identity: str) -> float | None:
        """Return the quality on the selection prompts; None without a result, or when it is NaN."""
        try:
            result = read_result(self.store.dir(StageName("evaluate", identity)))
        except FileNotFoundError:
            return None
        value = result["splits"]["selection"]["value"]
        return None if value != value else value

    def _state(self, rung: int) -> RungState | None:
        if not self.is_halving:
            return None
        results = tuple(map(tuple, self.results))
        return RungState(
            tuple(self.rungs), self.keep_fraction, rung, tuple(self.entry_rung), tuple(self.rung_of), results
        )

    def _load_progress(self, folder: SweepFolder) -> tuple[int, dict[str, PointFailure]]:
        """Return the number of rungs already completed by an earlier invocation, and the points that failed in them.

        (0, {}) if that search finished, so that failed points are retried.
        """
        sweep = folder.read() if folder.exists() else {}
        points, search = sweep.get("points", []), sweep.get("search")
        known = {identity for results in self.results for identity in results}
        same_points = len(points) == len(self.points) and all(point["identity"] in known for point in points)
        if search is None or not same_points:
            return 0, {}
        same_search = search["rungs"] == self.rungs and search["keep_fraction"] == self.keep_fraction
        finished = search["rung"] == len(self.rungs) and sweep["finished"]
        if finished or not same_search:
            return 0, {}
        failures = {
            point["identity"]: PointFailure(point["state"], point["error"] or "not run")
            for point in points
            if point["rung"] < search["rung"]
            and point["state"] in ("failed", "cancelled")
            and not self.store.is_done(StageName("evaluate", point["identity"]))
        }
        return search["rung"] - 1, failures
