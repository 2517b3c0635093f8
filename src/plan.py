"""Points -> the graph of stages that produce them, each distinct stage once, with its identity and state. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from src.config import HubTable, Optimisation, Point, method_options
from src.data.questions import check_readable
from src.identity import digest, fingerprint, part_of
from src.judges import identity_fields
from src.methods import METHODS
from src.store import Store

# Raise a stage's number when what it computes changes: old artefacts are then not its own any more.
VERSIONS = {"sft": 7, "reference": 6, "align": 6, "generate": 6, "evaluate": 3}


@dataclass(frozen=True)
class Stage:
    """A step of a point. Two stages with equal fields and upstream are the same one, whichever point asks."""

    kind: str
    fields: dict[str, Any]
    upstream: dict[str, Stage]  # role -> stage
    point: Point = field(compare=False, repr=False)  # one that needs it; what fields leave out may differ

    @cached_property
    def description(self) -> dict[str, Any]:
        return {
            "stage": self.kind,
            "version": VERSIONS[self.kind],
            "fields": self.fields,
            "upstream": {role: stage.identity for role, stage in self.upstream.items()},
        }

    @cached_property
    def identity(self) -> str:
        if self.stop == 1:
            return digest(self.description)
        trainer = {name: value for name, value in self.fields["trainer"].items() if name != "stop"}
        return part_of(replace(self, fields=self.fields | {"trainer": trainer}).identity, self.stop)

    @property
    def stop(self) -> float:
        """The share of its steps after which it stops; a longer part of the same run goes on from there."""
        return self.fields.get("trainer", {}).get("stop", 1.0)

    @property
    def role(self) -> str:
        """The kind, and for the samples a judge compares with `baseline`."""
        return "baseline" if self.fields.get("role") == "baseline" else self.kind

    @property
    def label(self) -> str:
        """What a person calls it in a progress line."""
        if self.role in ("sft", "reference", "baseline"):
            fraction = self.point.dataset.sft_fraction
            share = "" if fraction == 1 or self.role == "baseline" else f" on {100 * fraction:g} %"
            return f"{self.point.setup.name} {self.role}{share}"
        return f"{self.point.label} {self.kind}"


def stages_of(point: Point) -> list[Stage]:
    """The stages of a point in the order they run; the last one is `evaluate`."""
    stages: list[Stage] = []

    def add(kind: str, fields: dict[str, Any], by: Point = point, **upstream: Stage | None) -> Stage:
        present = {role: stage for role, stage in upstream.items() if stage is not None}
        stage = Stage(kind, fields, present, by)
        if stage not in stages:
            stages.append(stage)
        return stage

    model = {
        "model": fingerprint(point.model.path, point.model.revision),
        "template": point.model.template,
        "precision": point.engine.precision,
    }
    training = {"lora": None if point.model.lora.rank is None else asdict(point.model.lora)}
    (sft_data, pairs), evaluation = _data_fields(point), point.evaluation
    judge = identity_fields(point.judge)
    sampled = judge is not None and judge["baseline"] == "sft"  # what it compares with is sampled from the SFT model

    def sft(fraction: float) -> Stage:
        data = {**sft_data, "sft_fraction": fraction}
        by = replace(point, dataset=replace(point.dataset, sft_fraction=fraction))
        fields = {**model, **training, "data": data, "trainer": _trainer(point.trainer.sft), "seed": point.seed}
        return add("sft", fields, by)

    fraction = point.dataset.sft_fraction
    init = sft(fraction) if point.init.name == "sft" and fraction > 0 else None
    # The base model has no stage: it is part of the fields of whoever starts from it.
    start = {**model, "init": "base" if init is None else "sft"}

    reference = None
    if METHODS[point.method.name].needs_reference:
        reference = add("reference", {**start, "data": pairs}, init=init)
    align = add(
        "align",
        {
            **start,
            **training,
            "data": pairs,
            "method": {"name": point.method.name, **method_options(point)},
            "beta": point.beta,
            "sft_weight": point.init.sft_weight,
            "align_weight": point.init.align_weight,
            "trainer": _trainer(point.trainer.align),
            "lr": point.lr,
            "seed": point.seed,
        },
        init=init,
        reference=reference,
    )

    generation = asdict(evaluation.generation)
    del generation["batch_size"]  # samples do not depend on it
    # What draws samples decides which.
    server = None if point.server.name == "none" else {"name": point.server.name, "command": point.server.command}
    sampling = {
        "server": server,
        "data": pairs,
        "prompts": evaluation.prompts,
        "questions": evaluation.questions and fingerprint(evaluation.questions, key="evaluation.questions"),
        "generation": generation,
        "seed": point.seed,
    }
    # The baseline is the SFT model's whatever the point starts from: points are compared with one and the same.
    baseline = add("generate", {**model, **sampling, "role": "baseline"}, checkpoint=sft(1.0)) if sampled else None
    samples = add("generate", {**start, **sampling, "role": "policy"}, checkpoint=align, reference=init)
    add(
        "evaluate",
        {
            "setup": point.setup.name,
            "init": point.init.name,
            "data": pairs,
            "judge": judge,
            "quality": evaluation.quality,
            "selection_fraction": evaluation.selection_fraction,
            "split_seed": evaluation.split_seed,
        },
        align=align,
        samples=samples,
        baseline=baseline,
    )
    return stages


def _trainer(optimisation: Optimisation) -> dict[str, Any]:
    fields = asdict(optimisation) | {"adam_betas": list(optimisation.adam_betas)}
    if fields.get("stop") == 1:  # a run that goes to its end is what it was before there were shorter ones
        del fields["stop"]
    return fields


def _data_fields(point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the dataset SFT depends on, and what everything that reads pairs or their prompts does."""
    data = point.dataset
    common: dict[str, Any] = {
        "source": data.source,
        "seed": data.seed,
        "max_tokens": data.max_tokens,
        "max_prompt_tokens": data.max_prompt_tokens,
    }
    if data.path is not None:
        common["path"] = fingerprint(data.path, key="dataset.path")
    pairs = {**common, "train_size": data.train_size, "validation_size": data.validation_size}
    # JSON lines have no SFT table of their own: their SFT data are the chosen responses of the training pairs.
    sft = {**(pairs if data.source == "jsonl" else common), "sft_size": data.sft_size}
    if data.source == "hub":
        assert data.sft is not None and data.preference is not None
        sft["sft"], pairs["preference"] = _table(data.sft), _table(data.preference)
    return sft, pairs


def tokens_depend_on(point: Point) -> dict[str, Any]:
    """What the tokens of the point's data depend on, besides its template."""
    sft, pairs = _data_fields(point)
    model = fingerprint(point.model.path, point.model.revision)
    return {"model": model, "pairs": pairs, "sft": {**sft, "sft_fraction": point.dataset.sft_fraction}}


def _table(table: HubTable) -> dict[str, Any]:
    """Without what is only said of it: how large it is."""
    said = ("rows", "tokens")
    return {name: value for name, value in asdict(table).items() if name not in said}


@dataclass
class Plan:
    """The stages of a list of points, each once, upstream first."""

    points: list[Point]
    stages: dict[str, Stage]  # identity -> stage
    point_stages: list[list[str]]  # per point: the identities of its stages, upstream first, `evaluate` last
    done: set[str] = field(default_factory=set)  # identities whose artefacts are there
    needed: set[str] = field(default_factory=set)  # identities that must be computed for the points to be complete
    left: set[str] = field(default_factory=set)  # results that are given up: nothing is needed for them

    @property
    def results(self) -> list[str]:
        """Per point: the identity of its evaluate stage."""
        return [own[-1] for own in self.point_stages]

    def look(self, store: Store) -> None:
        """See what is done and what is therefore needed, now."""
        self.done = {identity for identity, stage in self.stages.items() if store.is_done(stage)}
        self.needed = set()
        todo = [result for result in self.results if result not in self.done | self.left]
        while todo:
            identity = todo.pop()
            if identity not in self.needed:
                self.needed.add(identity)
                for role, up in self.stages[identity].upstream.items():
                    # Samples need the model itself, which `keep` may have removed since.
                    if up.identity not in self.done or (role == "checkpoint" and not store.has_weights(up)):
                        todo.append(up.identity)

    def text(self) -> str:
        """What would run, for `dry_run=true`."""
        lines = []
        for point, result in zip(self.points, self.results, strict=True):
            state = "done" if result in self.done else "to do"
            lines.append(f"{state:6} {result}  {point.setup.name}  {point.label}")
        counts: dict[str, list[int]] = {}
        for identity, stage in self.stages.items():
            row = counts.setdefault(stage.role, [0, 0])
            row[0 if identity in self.needed else 1] += 1
        finished = sum(result in self.done for result in self.results)
        lines.append("")
        lines.append(f"{len(self.points)} points: {finished} done, {len(self.points) - finished} to do")
        lines.append("stage      to do  done or not needed")
        lines += [f"{role:9} {todo:6} {rest:6}" for role, (todo, rest) in counts.items()]
        return "\n".join(lines)


def make_plan(points: Iterable[Point], store: Store) -> Plan:
    """Which stages the points consist of, and which of them are still to do.

    Raises ConfigError when a model or data file is not there or cannot be read.
    """
    points = list(points)
    check_readable(points)
    stages: dict[str, Stage] = {}
    point_stages = []
    for point in points:
        own = stages_of(point)
        for stage in own:
            stages.setdefault(stage.identity, stage)
        point_stages.append([stage.identity for stage in own])
    plan = Plan(points, stages, point_stages)
    plan.look(store)
    return plan
