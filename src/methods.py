"""The table of alignment methods, without torch. A method's loss is the function with its name in `src.losses`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """The display name of a method, the score its loss takes, and the config fields it takes besides beta."""

    name: str  # in tables and figures
    score: str  # "log_ratio" (summed, against the reference) | "mean_log_prob" | "log_odds"
    kind: str  # "pairwise" (only the margin counts) | "pointwise"
    options: tuple[str, ...] = field(default=())
    trl_beta: float | None = None  # TRL's default, where its beta means the same

    @property
    def needs_reference(self) -> bool:
        return self.score == "log_ratio"


METHODS: dict[str, Method] = {
    "dpo": Method("DPO", "log_ratio", "pairwise", trl_beta=0.1),
    "ipo": Method("IPO", "log_ratio", "pairwise"),
    "simpo": Method("SimPO", "mean_log_prob", "pairwise", ("gamma_beta_ratio",), trl_beta=0.1),
    "orpo": Method("ORPO", "log_odds", "pairwise"),
    "asft": Method("ASFT", "log_odds", "pointwise"),
    "apo_zero": Method("APO-Zero", "log_ratio", "pointwise", trl_beta=0.1),
    "nca": Method("NCA", "log_ratio", "pointwise", trl_beta=0.1),
    "cal_dpo": Method("Cal-DPO", "log_ratio", "pointwise", ("calibration_weight",)),
}
