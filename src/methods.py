"""The tables of scores and of alignment methods, without torch.

A method is a loss (a function of `src.losses`) of the scores of a pair's two responses (functions of `src.scores`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What a score of a response needs, and whether comparing it with 0 says something."""

    needs_reference: bool
    is_signed: bool  # False: never positive, whatever the model says
    options: tuple[str, ...] = ()  # config fields it takes


SCORES: dict[str, Score] = {
    "log_ratio": Score(needs_reference=True, is_signed=True),
    "mean_log_ratio": Score(needs_reference=True, is_signed=True),
    "length_log_ratio": Score(needs_reference=True, is_signed=True, options=("length_beta_ratio",)),
    "log_prob": Score(needs_reference=False, is_signed=False),
    "mean_log_prob": Score(needs_reference=False, is_signed=False),
    "log_odds": Score(needs_reference=False, is_signed=True),
    "alpha": Score(needs_reference=False, is_signed=False, options=("alpha",)),
    "forward_kl": Score(needs_reference=True, is_signed=False),
}


@dataclass(frozen=True)
class Method:
    """The display name of a method, its loss, the score that takes by default, and the config fields the loss takes."""

    name: str  # in tables and figures
    loss: str  # a function of src.losses
    score: str  # a key of SCORES; method.score overrides it
    kind: str  # "pairwise" (only the margin counts) | "pointwise"
    options: tuple[str, ...] = ()  # of the loss, besides beta
    trl_beta: float | None = None  # TRL's default, where its beta means the same

    @property
    def needs_reference(self) -> bool:
        """Whether the default score does."""
        return SCORES[self.score].needs_reference


# What `method=all` means, where the chosen beta grid lists them: the methods that the paper compares.
COMPARED: dict[str, Method] = {
    "dpo": Method("DPO", "logistic", "log_ratio", "pairwise", trl_beta=0.1),
    "ipo": Method("IPO", "ipo", "log_ratio", "pairwise"),
    "simpo": Method("SimPO", "simpo", "mean_log_prob", "pairwise", ("gamma_beta_ratio",), trl_beta=0.1),
    "orpo": Method("ORPO", "logistic", "log_odds", "pairwise"),
    "asft": Method("ASFT", "cross_entropy", "log_odds", "pointwise"),
    "apo_zero": Method("APO-Zero", "apo_zero", "log_ratio", "pointwise", trl_beta=0.1),
    "nca": Method("NCA", "nca", "log_ratio", "pointwise", trl_beta=0.1),
    "cal_dpo": Method("Cal-DPO", "cal_dpo", "log_ratio", "pointwise", ("calibration_weight",)),
}

# The rest of the family: by name, or all methods at once by +methods=family.
FAMILY: dict[str, Method] = {
    "hinge": Method("SLiC-HF", "hinge", "log_ratio", "pairwise", trl_beta=0.1),
    "robust_dpo": Method("Robust DPO", "robust_dpo", "log_ratio", "pairwise", ("label_smoothing",), trl_beta=0.1),
    "cdpo": Method("cDPO", "cdpo", "log_ratio", "pairwise", ("label_smoothing",)),
    "exo_pair": Method("EXO-pair", "exo_pair", "log_ratio", "pairwise", ("rejected_probability",), trl_beta=0.1),
    "discopop": Method("DiscoPOP", "discopop", "log_ratio", "pairwise", ("discopop_tau",), trl_beta=0.1),
    "r_dpo": Method("R-DPO", "logistic", "length_log_ratio", "pairwise"),
    "ln_dpo": Method("LN-DPO", "logistic", "mean_log_ratio", "pairwise", trl_beta=0.1),
    "alphapo": Method("AlphaPO", "logistic", "alpha", "pairwise"),
    "alphapo_point": Method("AlphaPO-point", "cross_entropy", "alpha", "pointwise"),
    "forward_kl": Method("FKL", "logistic", "forward_kl", "pairwise", trl_beta=0.1),
    "forward_kl_point": Method("FKL-point", "cross_entropy", "forward_kl", "pointwise"),
    "sppo_hard": Method("SPPO-hard", "sppo_hard", "log_ratio", "pointwise", trl_beta=0.1),
    "bco_pair": Method("BCO-pair", "cross_entropy", "log_ratio", "pointwise", trl_beta=0.1),
    "apo_down": Method("APO-Down", "apo_down", "log_ratio", "pointwise", trl_beta=0.1),
    "dpop": Method("DPOP", "dpop", "log_ratio", "pointwise", ("penalty_weight",)),
}

METHODS: dict[str, Method] = COMPARED | FAMILY


def scores_of(method: str) -> list[str]:
    """Return the scores a method's loss makes sense of, keys of SCORES.

    A pairwise loss takes any. A pointwise one compares every score with 0, so of the scores that are never positive
    it takes only those that a method pairs it with.
    """
    spec = METHODS[method]
    paired = {other.score for other in METHODS.values() if other.loss == spec.loss}
    return [name for name, score in SCORES.items() if spec.kind == "pairwise" or score.is_signed or name in paired]


def options_of(method: str, score: str) -> tuple[str, ...]:
    """Return the config fields that a method takes with this score, besides beta."""
    return METHODS[method].options + SCORES[score].options
