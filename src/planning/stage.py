"""A stage of a point, and which stages a point consists of. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from src.config.fields import select_fields
from src.config.judge import Judge, JudgeEndpoint
from src.config.judge_rules import ENDPOINT_JUDGES, MODEL_JUDGES, metric_of
from src.config.schema import Point, Training, method_options
from src.methods import METHODS, SCORES
from src.planning.content import digest, hashable
from src.planning.identity import (
    VERSIONS,
    AlignInputs,
    CandidatesInputs,
    CapabilityInputs,
    EvaluateInputs,
    FurtherJudgeInputs,
    GenerateInputs,
    GenerationInputs,
    JudgeInputs,
    PairsInputs,
    ReferenceInputs,
    SftInputs,
    StageInputs,
)
from src.planning.inputs import (
    candidates_inputs,
    capability_inputs,
    judge_inputs,
    model_inputs,
    pair_data,
    pairs_inputs,
    prompt_inputs,
    sft_data,
)
from src.planning.resources import Resources, resources_of
from src.store.store import FURTHER_JUDGE, OF_SFT_MODEL, SHARED_ROLES, partial_run_id


@dataclass(frozen=True)
class Stage:
    """A step of a point. Two stages with equal inputs and upstream are the same stage, whichever point asks for it."""

    inputs: StageInputs
    upstream: dict[str, Stage]  # role -> stage
    resources: Resources = field(compare=False, repr=False)
    point: Point = field(compare=False, repr=False)  # one that needs the stage, for labels, estimates and tracking

    @property
    def kind(self) -> str:
        return self.inputs.kind

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of stage.json: everything the identity is a digest of."""
        return {
            "stage": self.kind,
            "version": VERSIONS[self.kind],
            "inputs": hashable(self.inputs),
            "upstream": {role: stage.identity for role, stage in self.upstream.items()},
        }

    @cached_property
    def identity(self) -> str:
        if self.stop_fraction == 1:
            return digest(self.description)
        assert isinstance(self.inputs, AlignInputs)
        full_run = replace(self, inputs=replace(self.inputs, stop_fraction=1.0))
        return partial_run_id(full_run.identity, self.stop_fraction)

    @property
    def packages(self) -> tuple[str, ...]:
        """The optional packages that computing the stage uses, for provenance."""
        match self.inputs:
            case SftInputs() | AlignInputs() if self.resources.zero_stage:
                return ("deepspeed",)
            case (CandidatesInputs() | GenerateInputs()) as inputs if inputs.generation.server is not None:
                return inputs.generation.server[0], "openai"
            case CapabilityInputs(server=server):
                return "lm-eval", *(server or ())[:1]
            case EvaluateInputs(judge=JudgeInputs(name=name)) if name in ENDPOINT_JUDGES:
                return ("alpaca-eval", "openai") if name == "alpaca_eval" else ("openai",)
            case EvaluateInputs(judge=JudgeInputs(name="math")) | PairsInputs(judge=JudgeInputs(name="math")):
                return "math-verify", "latex2sympy2-extended"
        return ()

    @property
    def run_config(self) -> dict[str, Any]:
        """The resolved config of a run that needs the stage, for provenance: nothing is read from it."""
        return asdict(self.point)

    @property
    def stop_fraction(self) -> float:
        """The fraction of its steps after which the stage stops; a longer run of the same training resumes there."""
        return self.inputs.stop_fraction if isinstance(self.inputs, AlignInputs) else 1.0

    @property
    def is_training(self) -> bool:
        return isinstance(self.inputs, SftInputs | AlignInputs)

    @property
    def is_shared(self) -> bool:
        """Whether all processes of a job compute it together; rank 0 judges without a model by itself."""
        match self.inputs:
            case EvaluateInputs(judge=judge) | PairsInputs(judge=judge):
                return judge is not None and judge.name in MODEL_JUDGES
        return True

    @property
    def role(self) -> str:
        """The kind, but `baseline` for the samples that a judge compares with, `sft_capability` for the SFT model's.

        Of a further judge `judge_NAME`.
        """
        match self.inputs:
            case FurtherJudgeInputs(name=name):
                return FURTHER_JUDGE + name
            case GenerateInputs(role="baseline"):
                return "baseline"
            case CapabilityInputs(role="sft"):
                return "sft_capability"
        return self.kind

    @property
    def label(self) -> str:
        """The name of the stage in progress lines."""
        if self.role in SHARED_ROLES:
            fraction = self.point.dataset.sft_fraction
            suffix = "" if fraction == 1 or self.role in OF_SFT_MODEL else f" on {100 * fraction:g} %"
            return f"{self.point.setup.name} {self.role}{suffix}"
        return f"{self.point.label} {self.role}"


def stages_of(point: Point) -> list[Stage]:
    """Return the stages of a point in the order they run; the last one is `evaluate`.

    Raises ConfigError when a local model or data file does not exist.
    """
    stages: list[Stage] = []
    pairs = pair_data(point)
    resources = resources_of(point, pairs)

    def add(inputs: StageInputs, stage_point: Point = point, **upstream: Stage | None) -> Stage:
        present = {role: stage for role, stage in upstream.items() if stage is not None}
        stage = Stage(inputs, present, replace(resources, **_own_resources(inputs, point)), stage_point)
        if stage not in stages:
            stages.append(stage)
        return stage

    model = model_inputs(point)
    lora = None if point.model.lora.rank is None else point.model.lora

    def sft(fraction: float) -> Stage:
        stage_point = replace(point, dataset=replace(point.dataset, sft_fraction=fraction))
        data = sft_data(stage_point)
        inputs = SftInputs(model, lora and replace(lora, publish="merged"), data, point.trainer.sft, point.seed)
        return add(inputs, stage_point)

    fraction = point.dataset.sft_fraction
    # The base model has no stage: it is part of the inputs of the stages that start from it.
    initial = sft(fraction) if point.init.name == "sft" and fraction > 0 else None
    init = "base" if initial is None else "sft"

    server = None if point.server.name == "none" else (point.server.name, point.server.command or "")
    judge = judge_inputs(point.judge, "judge", server)
    made_pairs = None  # by a stage; None: those of the dataset
    if point.pairs.name == "onpolicy":
        inputs = candidates_inputs(point, model, server)
        candidates = add(inputs, checkpoint=initial)
        made_pairs = add(pairs_inputs(point, inputs), candidates=candidates)
        pairs = pairs.held_out
    reference = None
    score = point.method.score
    if SCORES[score].needs_reference:
        reference = add(ReferenceInputs(model, init, pairs), init=initial, pairs=made_pairs)
    align = add(
        AlignInputs(
            model=model,
            init=init,
            lora=lora,
            data=pairs,
            method=point.method.name,
            options=method_options(point),
            beta=point.beta,
            sft_weight=point.init.sft_weight,
            align_weight=point.init.align_weight,
            trainer=select_fields(Training, point.trainer.align, lr=point.lr),
            seed=point.seed,
            stop_fraction=point.trainer.align.stop_fraction,
            save_dtype=point.model.save_dtype,
            other_score=None if score == METHODS[point.method.name].score else score,
        ),
        init=initial,
        reference=reference,
        pairs=made_pairs,
    )

    prompts = prompt_inputs(point)
    generation = select_fields(GenerationInputs, point.evaluation.generation, server=server)

    def baseline_of(judge: JudgeInputs | None) -> Stage | None:
        if judge is None or judge.baseline != "sft":
            return None
        # The baseline is the SFT model's whatever the point starts from: all points are compared with the same one.
        of_baseline = GenerateInputs("baseline", model, "sft", prompts, generation, point.seed)
        return add(of_baseline, checkpoint=sft(1.0))

    baseline = baseline_of(judge)
    of_policy = GenerateInputs("policy", model, init, prompts, generation, point.seed)
    samples = add(of_policy, checkpoint=align, reference=initial)
    capability = sft_capability = None
    if (of_sft := capability_inputs(point, model, "sft")) is not None:
        sft_capability = add(of_sft, checkpoint=sft(1.0))  # of the same model for all points, as the baseline
        capability = add(replace(of_sft, role="policy"), checkpoint=align, reference=initial)
    names = {"setup": point.setup.name, "init": point.init.name}
    evaluate = select_fields(
        EvaluateInputs, point.evaluation, **names, **_asked(point.judge), prompts=prompts, judge=judge
    )
    further: dict[str, Any] = {}
    for name, other in point.judges.items():
        asked = judge_inputs(other, f"judges.{name}", server)
        values = {"name": name, "judge": asked, "metric": metric_of(other.name), **_asked(other)}
        further_inputs = select_fields(FurtherJudgeInputs, evaluate, **values)
        further[FURTHER_JUDGE + name] = add(further_inputs, samples=samples, baseline=baseline_of(asked))
    is_validated = initial is not None and point.dataset.sft_validation_size != 0
    add(
        evaluate,
        align=align,
        samples=samples,
        baseline=baseline,
        capability=capability,
        sft_capability=sft_capability,
        sft=initial if is_validated else None,
        **further,
    )
    return stages


def with_all_judged(point: Point) -> Point:
    """Return the point with all its prompts judged, by all of its judges."""
    judges = {name: replace(judge, reporting="all") for name, judge in point.judges.items()}
    return replace(point, judge=replace(point.judge, reporting="all"), judges=judges)


def _asked(judge: Judge) -> dict[str, Any]:
    """Return the fields of EvaluateInputs that say what a judge is asked."""
    judged = "selection" if judge.reporting == "selected" else "all"
    return {"judged": judged, "repeated_prompts": judge.repeated_prompts}


def _own_resources(inputs: StageInputs, point: Point) -> dict[str, Any]:
    """Return the resources of a stage that differ from those of the point's other stages."""
    match inputs:
        case CandidatesInputs():
            assert point.pairs.generation is not None
            return {"sampling_batch_size": point.pairs.generation.batch_size}
        case FurtherJudgeInputs(name=name):
            return {"judge": select_fields(JudgeEndpoint, point.judges[name])}
    return {}
