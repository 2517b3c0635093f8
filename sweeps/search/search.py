"""A sweep on its way: all of its points to their end at once, or rung by rung (see sweeps.search.successive_halving).

What comes next is read from the store at every call, so that the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import sys

from launchers.protocol import PlanLauncher
from src.errors import PointFailure
from src.planning.cost import Cost, disk_warning
from src.planning.plan import Plan, make_plan
from src.preflight import check_hub, check_key, check_packages
from src.store.files import read_json
from src.store.retention import apply_retention_after_rung, best_results_in_store
from src.store.store import RESULT_FILE, StageName, Store
from src.store.sweep_folder import SweepFolder
from src.tracking.following import Following
from sweeps.search import successive_halving as halving
from sweeps.search.record import FILE, SweepRecord, read_sweep
from sweeps.search.successive_halving import Standing

FINALIZE = "sweeps.finalize:finalize"  # what the aggregation job of a sweep calls


class Search:
    def __init__(self, plan: Plan, store: Store) -> None:
        """plan: of the sweep's points, all of them to their end."""
        self.store, self.whole, self.points = store, plan, plan.points
        sweep = plan.points[0].sweep
        self.halving, self.share = sweep.search == "successive_halving", sweep.keep_fraction
        self.rungs = sweep.rungs if self.halving else [1.0]
        parts = [make_plan([halving.stopped(p, stop) for p in plan.points], store) for stop in self.rungs[:-1]]
        self.results = [own.results for own in (*parts, plan)]
        self.start = [0] * len(plan.points)
        if self.halving:
            whole, first = ([self._quality(i) is not None for i in own] for own in (self.results[-1], self.results[0]))
            self.start = halving.begin(plan.points, whole, first, len(self.rungs) - 1)
        self.at = list(self.start)
        self.warned = False

    def text(self) -> str:
        """What would run, for `dry_run=true`: the rung that is next, and what is foreseen of the others."""
        for rung in range(len(self.rungs)):
            plan = self._plan({})
            if plan.needed or rung == len(self.rungs) - 1:
                break
            self._advance(rung)
        said = [plan.text(), Cost(plan, self.store).text()]
        if self.halving:
            anew = ", as if its points started anew" if rung else ""
            said += [f"\nabove: rung {rung + 1} of {len(self.rungs)}{anew}"] if plan.needed else []
            said += [halving.table(self.points, self.start, self.at, rung, self.rungs, self.share)]
        return "\n".join(said)

    def run(self, launcher: PlanLauncher, name: str, command: str) -> None:
        """Hand rung after rung to the launcher, then conclude; or return when jobs go on.

        Raises SweepFailed when points failed.
        """
        folder = SweepFolder(self.store.sweep_dir(name))
        with Following(self.store, folder.logs / "wandb.log", folder.path) as wandb:
            self._run(launcher, name, command, wandb)

    def _run(self, launcher: PlanLauncher, name: str, command: str, wandb: Following) -> None:
        over, lost = self._over(name)
        last = len(self.rungs) - 1
        for rung in range(len(self.rungs)):
            plan = self._plan(lost)
            record = SweepRecord(self.store, plan, name, command, self._standing(rung), dict(lost))
            if rung == last or (rung >= over and plan.needed):
                self._check(plan, launcher)
                if self.halving and plan.needed:
                    self._say(name, rung)
                record.start()
                if launcher.runs_in_process:
                    wandb.points(plan.points)
                    wandb.sweep(record.folder.path)
                elif plan.needed:
                    wandb.elsewhere(plan.points)
                failures = launcher.launch_plan(plan, record.folder, FINALIZE)
                if failures is None:
                    record.submitted()
                    if rung < last:
                        print(f"when rung {rung + 1} is done, rerun the same command to start rung {rung + 2}")
                    return
                lost |= failures
            if rung < last:
                before = self.at
                self._advance(rung)
                stay = {self.results[rung][i] for i, at in enumerate(self.at) if at == before[i] == rung}
                apply_retention_after_rung(
                    self.store,
                    plan.stages_by_role,
                    plan.points[0].keep_checkpoints,
                    stay,
                    best_results_in_store(self.store),
                )
        from sweeps.finalize import finalize  # pandas: only when there is something to aggregate

        try:
            finalize(record.folder.path, lost)
        finally:
            wandb.sweep(record.folder.path)

    def _plan(self, lost: dict[str, PointFailure]) -> Plan:
        """Every point as far as it has got. What was lost on the way is not tried again in a later rung."""
        if not self.halving:
            return self.whole
        plan = make_plan(
            [halving.stopped(p, self.rungs[at]) for p, at in zip(self.points, self.at, strict=True)], self.store
        )
        plan.abandoned = set(lost)
        plan.refresh(self.store)
        return plan

    def _check(self, plan: Plan, launcher: PlanLauncher) -> None:
        """What can be wrong before anything is written down. Raises ConfigError."""
        if plan.needed:
            check_packages(plan.points)
            check_key(plan.points)
        if plan.needed and not self.warned:
            self.warned = True
            for warning in filter(None, [*check_hub(plan.points), disk_warning(plan, self.store)]):
                print(f"warning: {warning}", file=sys.stderr)
        launcher.check(plan)

    def _say(self, name: str, rung: int) -> None:
        far = "the end" if self.rungs[rung] == 1 else f"{100 * self.rungs[rung]:g} % of their steps"
        print(f"{name}: rung {rung + 1} of {len(self.rungs)}: {self.at.count(rung)} points to {far}", flush=True)

    def _advance(self, rung: int) -> None:
        quality = [self._quality(identity) for identity in self.results[rung]]
        self.at = halving.advance(self.points, self.at, quality, rung, self.share)

    def _quality(self, result: str) -> float | None:
        """On the prompts that choose; None where there is no result, or it is not a number."""
        try:
            found = read_json(self.store.dir(StageName("evaluate", result)) / RESULT_FILE)
        except FileNotFoundError:
            return None
        value = found["splits"]["selection"]["value"]
        return None if value != value else value

    def _standing(self, rung: int) -> Standing | None:
        if not self.halving:
            return None
        results = tuple(tuple(own) for own in self.results)
        return Standing(tuple(self.rungs), self.share, rung, tuple(self.start), tuple(self.at), results)

    def _over(self, name: str) -> tuple[int, dict[str, PointFailure]]:
        """How many rungs earlier calls of this search have left behind, and what was lost in them. None of one that has
        ended: what failed is tried again."""
        folder = self.store.sweep_dir(name)
        sweep = read_sweep(folder) if (folder / FILE).exists() else {}
        known = {identity for own in self.results for identity in own}
        points, search = sweep.get("points", []), sweep.get("search")
        same = len(points) == len(self.points) and all(point["identity"] in known for point in points)
        if search is None or not same or search["rungs"] != self.rungs or search["share"] != self.share:
            return 0, {}
        if search["rung"] == len(self.rungs) and sweep["finished"]:
            return 0, {}
        lost = {
            point["identity"]: PointFailure(point["state"], point["error"] or "not run")
            for point in points
            if point["rung"] < search["rung"]
            and point["state"] in ("failed", "cancelled")
            and not self.store.is_done(StageName("evaluate", point["identity"]))
        }
        return search["rung"] - 1, lost
