"""The plan of a list of points: each distinct stage once, and which of them must be computed. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from src.config.schema import Point
from src.errors import ConfigError, warn
from src.planning.stage import Stage, stages_of
from src.store.provenance import describe_other_versions
from src.store.store import Store, kind_of


@dataclass
class Plan:
    """The stages of a list of points, each once, upstream first."""

    points: list[Point]
    stages: dict[str, Stage]  # identity -> stage
    point_stages: list[list[str]]  # per point: the identities of its stages, upstream first, `evaluate` last
    done: set[str] = field(default_factory=set)  # identities whose artifacts are there
    damaged: dict[str, str] = field(default_factory=dict)  # identities of damaged results -> what is damaged, and how
    needed: set[str] = field(default_factory=set)  # identities that must be computed for the points to be complete
    abandoned: set[str] = field(default_factory=set)  # results that are no longer needed, nor the stages for them alone

    @property
    def results(self) -> list[str]:
        """Identities of the evaluate stages, one per point."""
        return [stage_ids[-1] for stage_ids in self.point_stages]

    @property
    def num_points_to_compute(self) -> int:
        """Points without a result: so many can be computed at once."""
        return sum(result in self.needed for result in self.results)

    @property
    def start_order(self) -> list[int]:
        """The indices of the points in the order they start, seeds of one together.

        It is by their mean that a point is selected or its models are removed.
        """
        firsts: dict[tuple[object, ...], int] = {}
        for index, p in enumerate(self.points):
            firsts.setdefault(p.without_seed, index)
        return sorted(range(len(self.points)), key=lambda index: firsts[self.points[index].without_seed])

    @property
    def stages_by_role(self) -> list[dict[str, str]]:
        """For each point, role -> identity of its stages, `evaluate` last, as sweep.json records them."""
        return [{self.stages[i].role: i for i in stage_ids} for stage_ids in self.point_stages]

    def refresh(self, store: Store) -> None:
        """Read from the store what is done now, and derive what is needed.

        Results are read by whoever asked for the points: damaged ones are needed again. Other artifacts are checked
        when a stage reads them.
        """
        self.done = {identity for identity, stage in self.stages.items() if store.is_done(stage)}
        self.damaged = {}
        for result in self.done.intersection(self.results):
            if damage := store.damage(self.stages[result]):
                self.damaged[result] = damage
        self.done -= self.damaged.keys()
        self.needed = set()
        todo = [result for result in self.results if result not in self.done | self.abandoned]
        while todo:
            identity = todo.pop()
            if identity not in self.needed:
                self.needed.add(identity)
                for role, up in self.stages[identity].upstream.items():
                    # Samples need the model itself, which `keep_checkpoints` may have removed since.
                    if up.identity not in self.done or (role == "checkpoint" and not store.has_weights(up)):
                        todo.append(up.identity)

    def text(self) -> str:
        """Return a table of what would run, for `dry_run=true`."""
        lines = []
        for point, result in zip(self.points, self.results, strict=True):
            state = "done" if result in self.done else "to do"
            lines.append(f"{state:6} {result}  {point.setup.name}  {point.label}")
        roles = Counter(stage.role for stage in self.stages.values())
        todo = Counter(self.stages[identity].role for identity in self.needed)
        finished = sum(result in self.done for result in self.results)
        lines.append("")
        lines += [f"{damage}; to be computed again" for damage in self.damaged.values()]
        lines.append(f"{len(self.points)} points: {finished} done, {len(self.points) - finished} to do")
        width = max(10, *map(len, roles))
        lines.append(f"{'stage':{width}}  to do  done or not needed")
        lines += [f"{role:{width}} {todo[role]:6} {total - todo[role]:6}" for role, total in roles.items()]
        return "\n".join(lines)


def warn_of_other_versions(plan: Plan, store: Store) -> None:
    """Print one line when results, or what they are computed from, were made with other major versions of packages."""
    used = {up.identity for identity in plan.needed for up in plan.stages[identity].upstream.values()}
    reused = plan.done & (used | set(plan.results))
    if message := describe_other_versions(store.dir(plan.stages[identity]) for identity in sorted(reused)):
        warn(message)


def check_only_judges(plan: Plan) -> None:
    """Raise ConfigError when something else must be computed than verdicts, or samples to compare with."""
    roles = Counter(stage.role for identity, stage in plan.stages.items() if identity in plan.needed)
    others = {r: count for r, count in roles.items() if kind_of(r) not in ("judge", "evaluate") and r != "baseline"}
    if others:
        counts = ", ".join(f"{role} {count}" for role, count in others.items())
        raise ConfigError(
            f"sweep.judge_only=true: other stages are missing ({counts}): their artifacts are gone, or a file or key "
            "that they depend on is another one now; run the sweep's own command first"
        )


def warn_of_removed_models(plan: Plan) -> None:
    """Print one line when models that keep_checkpoints has removed are made again for what needs the models themselves.

    A stage that is done and needed nevertheless is such a model.
    """
    removed = plan.done & plan.needed
    if not removed:
        return
    stages = [plan.stages[identity] for identity in plan.needed]
    readers = {s.kind for s in stages if (model := s.upstream.get("checkpoint")) and model.identity in removed}
    warn(
        f"keep_checkpoints has removed the weights of {len(removed)} models that {' and '.join(sorted(readers))} must "
        "have: this command trains them again (dry_run=true says at what cost)"
    )


def make_plan(points: Iterable[Point], store: Store) -> Plan:
    """Plan the stages of the points and read from the store which of them are done.

    Raises ConfigError when a model or data file does not exist or cannot be read.
    """
    points = list(points)
    return _plan(points, [stages_of(point) for point in points], store)


def plan_of_results(results: Iterable[Stage], store: Store) -> Plan:
    """Return the plan of the points with these `evaluate` stages, which were planned elsewhere."""
    results = list(results)
    return _plan([result.point for result in results], [_with_upstream(result) for result in results], store)


def _with_upstream(stage: Stage) -> list[Stage]:
    """Return everything that a stage needs, upstream first, and the stage at the end."""
    upstream = chain.from_iterable(_with_upstream(up) for up in stage.upstream.values())
    return list({needed.identity: needed for needed in (*upstream, stage)}.values())


def _plan(points: list[Point], point_stages: list[list[Stage]], store: Store) -> Plan:
    stages: dict[str, Stage] = {}
    for stage in chain.from_iterable(point_stages):
        stages.setdefault(stage.identity, stage)
    plan = Plan(points, stages, [[stage.identity for stage in stage_list] for stage_list in point_stages])
    plan.refresh(store)
    return plan
