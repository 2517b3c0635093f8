"""`method.score=`: what it changes in a plan, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from src.config.schema import method_options
from src.config.validation import check
from src.errors import ConfigError
from src.methods import METHODS, SCORES, scores_of
from src.planning.stage import stages_of
from src.stages.align import ROUNDING_ULPS, pair_losses, score_rounding
from tests.support.commands import dry_run, run_in_process
from tests.support.configs import composed, identities, point, stage_of

VALUES = {"alpha": "0.25", "length_beta_ratio": "0.1"}


def with_score(method, score):
    """Return the overrides of a method with this score; beta and lr are needed where no best value is known."""
    return [f"method={method}", f"method.score={score}", "beta=0.1", "lr=1e-3"] + [
        f"method.{option}={VALUES[option]}" for option in SCORES[score].options
    ]


@pytest.mark.parametrize("method", ["dpo", "orpo", "alphapo"])
def test_the_default_score_is_the_tables_and_naming_it_changes_nothing(method):
    default = ["beta=0.1", "lr=1e-3", f"method={method}"]
    named = [*default, f"method.score={METHODS[method].score}"]
    assert point(*default).method.score == METHODS[method].score
    assert identities(*default) == identities(*named)
    assert point(*named).label == f"{method} beta=0.1 lr=0.001"


@pytest.mark.parametrize("method", METHODS)
def test_reference_log_probs_are_planned_where_the_score_needs_them(method):
    planned, chosen = {}, point(f"method={method}", "beta=0.1", "lr=1e-3")
    for score in scores_of(method):
        options = {option: float(VALUES[option]) for option in SCORES[score].options}
        chosen.method = replace(chosen.method, score=score, **options)  # composing takes longer than planning
        check(chosen)
        stages = {stage.kind: stage for stage in stages_of(chosen)}
        chosen.method = replace(chosen.method, **dict.fromkeys(options))
        assert ("reference" in stages) == SCORES[score].needs_reference
        assert ("reference" in stages["align"].upstream) == SCORES[score].needs_reference
        assert stages["align"].inputs.score == score
        planned[score] = stages["align"].identity
    assert len(set(planned.values())) == len(planned) > 3  # each is another training


def test_a_score_is_part_of_a_points_name_where_it_is_not_the_methods_own():
    assert point(*with_score("dpo", "log_odds")).label == "dpo beta=0.1 lr=0.001 method.score=log_odds"
    labels, output = dry_run("method=dpo,orpo", "beta=1", "method.score=log_ratio,log_odds")
    assert labels == [
        f"{method} beta=1 lr=0.001 method.score={score}"
        for method in ("dpo", "orpo")
        for score in ("log_ratio", "log_odds")
    ]
    assert "4 points" in output


def test_the_default_of_a_score_that_was_replaced_is_not_read():
    mean = [*with_score("alphapo", "mean_log_prob"), "method.alpha=0.5"]
    assert method_options(point(*mean)) == {}
    assert identities(*mean) == identities(*with_score("alphapo", "mean_log_prob"))
    assert identities(*with_score("alphapo", "alpha")) != identities("method=alphapo", "method.alpha=0.5", "beta=0.1")


REFUSED = [
    (["method=nca", "method.score=log_prob"], "method.score=log_prob: is never positive, and method=nca compares"),
    (["method=asft", "method.score=mean_log_prob"], "choose log_ratio, mean_log_ratio, length_log_ratio, log_odds"),
    (["method=dpop", "method.score=forward_kl"], "method.score=forward_kl: is never positive"),
    (["method.score=kl"], "method.score=kl: must be one of log_ratio, mean_log_ratio"),
    (["method.score=alpha"], "method.alpha: method=dpo with method.score=alpha needs a value: add method.alpha=VALUE"),
    (["method.alpha=0.25"], "method.alpha: method=dpo has no such field; remove the override"),
    (["method=alphapo", "method.alpha=null"], "method.alpha: method=alphapo with method.score=alpha needs a value"),
    (["method=simpo", "method.gamma_beta_ratio=null"], "method.gamma_beta_ratio: method=simpo needs a value"),
    (["method=alphapo", "method.alpha=11"], "method.alpha=11: must be >= -10 and <= 10"),
    (["method=robust_dpo", "method.label_smoothing=0.5"], "method.label_smoothing=0.5: must be >= 0 and <= 0.499"),
    (["method=exo_pair", "method.rejected_probability=0"], "method.rejected_probability=0: must be > 0 and <= 0.499"),
    (["method=discopop", "method.discopop_tau=2"], "method.discopop_tau=2: must be >= 0.001 and <= 1"),
    (["method.name=ppo"], "method.name=ppo: must be one of dpo, ipo"),
    (["-m", "method=dpo,nca", "method.score=log_ratio,log_prob"], "method.score=log_prob: is never positive"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_makes_no_sense_is_one_line_before_anything_is_written(arguments, message, tmp_path):
    done = run_in_process(*arguments, "beta=0.1", "lr=1e-3", f"output_dir={tmp_path}/outputs")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line
    assert not list(tmp_path.glob("outputs/*"))


def test_what_makes_sense_is_not_refused():
    for overrides in (
        with_score("asft", "log_ratio"),
        with_score("ipo", "mean_log_prob"),
        with_score("nca", "log_odds"),
    ):
        point(*overrides)
    with pytest.raises(ConfigError):
        point(*with_score("nca", "mean_log_prob"))
    assert composed("method=simpo", "method.score=alpha", "method.alpha=0.25").method.score == "alpha"


@pytest.mark.parametrize("score", SCORES)
def test_a_difference_that_rounding_makes_is_a_tie_and_one_of_training_is_not(score):
    """Chosen and rejected are one response whose log-prob is off by a unit in its last place, or by some dozens."""
    inputs = stage_of("align", *with_score("dpo", score)).inputs
    tokens, references = torch.tensor([12, 12]), torch.tensor([[-8.6, -8.6]])
    for ulps, is_tie in ((ROUNDING_ULPS / 8, True), (5 * ROUNDING_ULPS, False)):
        logps = torch.tensor([-8.2, -8.2 * (1 + ulps * torch.finfo(torch.float32).eps)])
        pairs = pair_losses(inputs, logps, tokens, references, [0])
        margin = (pairs.chosen_score - pairs.rejected_score).abs()
        assert margin > 0
        assert (margin <= score_rounding(inputs, logps, tokens, references, [0])).item() == is_tie
