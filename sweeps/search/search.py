"""Run a sweep: all points to their end at once, or rung by rung (sweeps.search.successive_halving).

The progress is read from the store at every call, so the same command resumes wherever it was stopped.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from launchers.protocol import PlanLauncher
from src.config.judge_rules import judged_in_part
from src.errors import ConfigError, PointFailure, StageError, warn
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.judges.endpoint_check import check_judges
from src.planning.plan import Plan, check_only_judges, make_plan
from src.planning.stage import with_all_judged
from src.preflight import check_hub, check_packages
from src.store.retention import discard_checkpoints, remove_models
from src.store.store import StageName, Store, read_result
from src.store.sweep_folder import SweepFolder
from src.tracking.sync_process import SyncProcess, sync_sweep
from sweeps.analysis.power import power_sentences
from sweeps.search.record import SweepRecord
from sweeps.search.running import RunningSweep
from sweeps.search.successive_halving import RungState, dry_run_table, entry_rungs, promote, with_stop

FINALIZE = "sweeps.aggregate:finalize"  # called by the last job of a sweep, or here when no jobs are submitted


class Search:
    """The plan of a sweep and the rungs in which it is run; a full grid has one rung."""

    def __init__(self, plan: Plan, store: Store) -> None:
        """Read from the store where each point enters. plan: of all points, each trained to its end."""
        self.full_plan, self.store, points = plan, store, plan.points
        options = points[0].sweep
        rungs = tuple(options.rungs) if options.search == "successive_halving" else (1.0,)
        plans = [*(make_plan([with_stop(p, stop) for p in points], store) for stop in rungs[:-1]), plan]
        first, full = ([result in p.done for result in p.results] for p in (plans[0], plan))
        entry = tuple(entry_rungs(points, full, first, len(rungs) - 1))
        results = tuple(tuple(p.results) for p in plans)
        self.state = RungState(tuple(points), rungs, options.keep_fraction, 0, entry, entry, results)
        self._warned = self._is_recorded = False

    def dry_run(self, launcher: PlanLauncher) -> None:
        """Print what would run: the plan of the next rung, and the expected size of the others.

        Raises ConfigError when it does not fit the card it is planned for.
        """
        while not (plan := self._plan({})).needed and not self.state.is_last:
            self._promote()
        forecast = Forecast(plan, launcher.num_processes, launcher.on_gpus, all_rehearsed=True)
        settled = launcher.settle(plan, forecast)
        forecast.update_processes()
        cost = Cost(plan, self.store, forecast, launcher.max_running(plan), launcher.starts_job)
        print(self._text(plan, [forecast.text(), cost.text(), settled]))
        forecast.check()

    def _text(self, plan: Plan, estimates: list[str]) -> str:
        parts = [plan.text(), *(text for text in estimates if text)]
        if self.state.is_halving:
            if plan.needed:
                anew = ", as if its points were trained from the start" if self.state.rung else ""
                parts.append(f"\nabove: rung {self.state.rung + 1} of {len(self.state.rungs)}{anew}")
            parts.append(dry_run_table(self.state))
        if sentences := power_sentences(self.state.points, self.store):
            parts.append("\n".join(["", *sentences]))
        return "\n".join(parts)

    def run(self, launcher: PlanLauncher, name: str, command: str) -> None:
        """Hand one rung after the other to the launcher, then aggregate; return early when jobs do the rest.

        Raises SweepFailed when points failed, StageError when the file system fails after work has begun.
        """
        folder = SweepFolder(self.store.sweeps / name)
        try:
            self._run(launcher, folder, command)
        except OSError as error:
            if not self._is_recorded:
                raise
            where = error.filename or folder.path
            raise StageError(f"{where}: {error.strerror or error}; mend that and run the same command again") from None

    def _run(self, launcher: PlanLauncher, folder: SweepFolder, command: str) -> None:
        with RunningSweep(folder) as running, sync_sweep(folder) as sync:
            num_completed, failures = self._load_progress(folder)
            while True:
                plan, rung = self._plan(failures), self.state.rung
                if self.state.is_last or (plan.needed and (rung >= num_completed or plan.damaged)):
                    record = SweepRecord(folder, plan, command, self.state, dict(failures))
                    new_failures = self._run_rung(launcher, record, running, sync)
                    if new_failures is None:
                        if not self.state.is_last:
                            print(f"when rung {rung + 1} is done, rerun the same command to start rung {rung + 2}")
                        return
                    failures |= new_failures
                if self.state.is_last:
                    break
                self._finish_rung(plan)
            from sweeps.aggregate import finalize  # pandas: only when there is something to aggregate

            new_failures = self._judge_selected(launcher, folder)
            if new_failures is None:
                record.write("submitted")
                return
            failures |= new_failures
            sync.start()
            finalize(folder.path, failures)

    def _run_rung(
        self, launcher: PlanLauncher, record: SweepRecord, running: RunningSweep, sync: SyncProcess
    ) -> dict[str, PointFailure] | None:
        """Return the failures of the rung; None when jobs compute it and finalize the sweep."""
        plan, state = record.plan, self.state
        self._check(plan, launcher)
        if state.is_halving and plan.needed:
            print(
                f"{record.folder.name}: rung {state.rung + 1} of {len(state.rungs)}: {state.rung_of.count(state.rung)} "
                f"points to {100 * state.rungs[state.rung]:g} % of their steps",
                flush=True,
            )
        record.start(running)
        self._is_recorded = True
        if launcher.runs_in_process:
            sync.start()
        elif plan.needed:
            sync.announce()
        failures = launcher.launch_plan(plan, record.folder, FINALIZE)
        if failures is None:
            record.write("submitted")
        return failures

    def _judge_selected(self, launcher: PlanLauncher, folder: SweepFolder) -> dict[str, PointFailure] | None:
        """Judge the selected points on the prompts that have no verdict yet (judge.reporting=selected).

        Return the failures; None when jobs do it.
        """
        if not judged_in_part(self.state.points[0]):
            return {}
        from sweeps.analysis.reporting_split import selected_points
        from sweeps.analysis.results import collect

        _, best = selected_points(collect([folder]), self.state.points[0].sweep.select)
        chosen = {identity for seeds in best.identities for identity in seeds}
        points = [p for p, result in zip(self.state.points, self.state.results[-1], strict=True) if result in chosen]
        plan = make_plan(map(with_all_judged, points), self.store)
        if not plan.needed:
            return {}
        self._check(plan, launcher)
        print(f"{folder.name}: judging {len(points)} selected points on the reporting prompts", flush=True)
        return launcher.launch_plan(plan, folder, FINALIZE)

    def _plan(self, failures: dict[str, PointFailure]) -> Plan:
        """Return the plan of the current rung: each point truncated to its rung, without those that failed before."""
        if not self.state.is_halving:
            return self.full_plan
        reached = zip(self.state.points, self.state.rung_of, strict=True)
        plan = make_plan([with_stop(point, self.state.rungs[rung]) for point, rung in reached], self.store)
        plan.abandoned = set(failures)
        plan.refresh(self.store)
        return plan

    def _check(self, plan: Plan, launcher: PlanLauncher) -> None:
        """Raise ConfigError for what would fail later, before anything is recorded."""
        if plan.needed:
            if plan.points[0].sweep.judge_only:
                check_only_judges(plan)
            check_packages(plan.points)
            if not self._warned:
                check_judges(plan, self.store, launcher.runs_in_process)
            forecast = Forecast(plan, launcher.num_processes, launcher.on_gpus, all_rehearsed=False)
            forecast.check()
            if settled := launcher.settle(plan, forecast):
                print(settled, flush=True)
        if plan.needed and not self._warned:
            self._warned = True
            for warning in check_hub(plan.points):
                print(f"warning: {warning}", file=sys.stderr)
        launcher.check(plan)

    def _promote(self) -> None:
        """Make the next rung the current one, with the better points in it."""
        state = self.state
        quality = [self._quality(identity) for identity in state.results[state.rung]]
        rung_of = promote(state.points, state.rung_of, quality, state.rung, state.keep_fraction)
        self.state = replace(state, rung=state.rung + 1, rung_of=tuple(rung_of))

    def _finish_rung(self, plan: Plan) -> None:
        """Promote the better points, and delete what only the promotion of the others would have needed."""
        before = self.state
        self._promote()
        moves = zip(before.results[before.rung], before.rung_of, self.state.rung_of, strict=True)
        rejected = {result for result, old, new in moves if old == new == before.rung}
        if plan.points[0].keep_checkpoints != "all":
            remove_models(self.store, plan.stages_by_role)
        discard_checkpoints(self.store, plan.stages_by_role, rejected)

    def _quality(self, identity: str) -> float | None:
        """Return the quality on the selection prompts; None without a readable result, or when it is NaN."""
        try:
            result = read_result(self.store.dir(StageName("evaluate", identity)))
        except FileNotFoundError:
            return None
        except ConfigError as error:
            warn(f"{error}; its point is not promoted")
            return None
        value = result["splits"]["selection"]["value"]
        return None if value != value else value

    def _load_progress(self, folder: SweepFolder) -> tuple[int, dict[str, PointFailure]]:
        """Return the number of rungs already completed by an earlier invocation, and the points that failed in them.

        (0, {}) if that search finished, so that failed points are retried.
        """
        sweep = folder.read() if folder.exists() else {}
        points, search = sweep.get("points", []), sweep.get("search")
        rungs, known = list(self.state.rungs), set().union(*self.state.results)
        same_points = len(points) == len(self.state.points) and all(point["identity"] in known for point in points)
        settings = rungs, self.state.keep_fraction
        if search is None or not same_points or (search["rungs"], search["keep_fraction"]) != settings:
            return 0, {}
        if search["rung"] == len(rungs) and sweep["finished"]:
            return 0, {}
        failures = {
            point["identity"]: PointFailure(point["state"], point["error"] or "not run")
            for point in points
            if point["rung"] < search["rung"]
            and point["state"] in ("failed", "cancelled")
            and not self.store.is_done(StageName("evaluate", point["identity"]))
        }
        return search["rung"] - 1, failures
