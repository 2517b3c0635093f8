"""docs/methods.md agrees with the code: its equations are evaluated, its numbers recomputed."""

import math
import re
from types import SimpleNamespace

import pytest
import sympy
import torch
from sympy.parsing.sympy_parser import (
    convert_xor,
    implicit_multiplication_application,
    parse_expr,
    standard_transformations,
)

from benchmarks.methods import draw, loss_and_gradients, options_of, table
from src.losses import LOSSES, log1mexp, preference_loss
from src.methods import METHODS
from tests.support.commands import ROOT

PAGE = (ROOT / "docs/methods.md").read_text()
BY_NAME = {spec.name: method for method, spec in METHODS.items()}
SYMBOLS = {"log_ratio": "r", "mean_log_prob": "p", "log_odds": "o"}  # of a score on the page


def tables(page):
    """Return each table as {first cell: other cells}, by its header."""
    by_header = {}
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split(" |")] for line in block.splitlines()]
        by_header[tuple(cell.strip() for cell in rows[0])] = {row[0]: row[1:] for row in rows[2:]}
    return by_header


TABLES = tables(PAGE)


def table_of(*header):
    (table,) = (rows for cells, rows in TABLES.items() if cells[: len(header)] == header)
    return table


EQUATIONS, NEEDS = table_of("method", "loss of a pair"), table_of("method", "`method=`")


def formula(cell):
    """Return a function that evaluates $...$, the page's TeX, for values of its letters."""
    (tex,) = re.findall(r"^\$([^$]+)\$$", cell)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", tex).replace("[", "(").replace("]", ")")
    text = re.sub(r"\\log\\sigma", " log_sigma ", text)
    text = re.sub(r"\\([a-z]+)", r" \1 ", text)
    names = {name: sympy.Symbol(name) for name in re.findall(r"[a-z]\w*", text)}
    names |= {"log": sympy.log, "sigma": lambda x: 1 / (1 + sympy.exp(-x))}
    names["log_sigma"] = lambda x: -sympy.log(1 + sympy.exp(-x))
    steps = (*standard_transformations, convert_xor, implicit_multiplication_application)
    parsed = parse_expr(text, local_dict=names, transformations=steps)
    return lambda **values: float(parsed.evalf(30, subs={str(s): values[str(s)] for s in parsed.free_symbols}))


def documented_options(method):
    """Return letter -> (name, default) of each option in the table."""
    cell = NEEDS[METHODS[method].name][-1]
    return {
        letter: (name, float(value)) for name, letter, value in re.findall(r"`(\w+)` \(\$\\?(\w+)\$\): ([\d.]+)", cell)
    }


def equals_loss(cell, method):
    """Return whether an equation of the page equals the loss in code, at many scores, betas and options."""
    equation, symbol = formula(cell), SYMBOLS[METHODS[method].score]
    options = {sign: (name, 1.3 * default) for sign, (name, default) in documented_options(method).items()}
    generator = torch.Generator().manual_seed(0)
    for beta in (0.03, 0.5, 1.0, 4.0):
        for chosen, rejected in (4 * torch.randn(8, 2, generator=generator, dtype=torch.float64)).tolist():
            if symbol == "p":
                chosen, rejected = -abs(chosen), -abs(rejected)
            scores = torch.tensor([chosen, rejected], dtype=torch.float64)
            value = LOSSES[method](*scores, beta, **dict(options.values())).item()
            w, lo = (math.exp(chosen), math.exp(rejected)) if symbol == "p" else (chosen, rejected)
            values = {f"{symbol}_w": w, f"{symbol}_l": lo, "beta": beta}
            try:
                documented = equation(**values, **{sign: value for sign, (_, value) in options.items()})
            except KeyError:  # a score that the method does not read
                return False
            if documented != pytest.approx(value, rel=1e-9, abs=1e-12):
                return False
    return True


@pytest.mark.parametrize("method", METHODS)
def test_every_equation_is_the_loss_that_trains(method):
    assert equals_loss(EQUATIONS[METHODS[method].name][0], method)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("DPO", "r_w", "o_w"),
        ("DPO", r"\beta(r_w", r"(r_w"),
        ("IPO", r"{2\beta}", r"{\beta}"),
        ("SimPO", "- g", "+ g"),
        ("ASFT", r"-\beta o_l", r"\beta o_l"),
        ("APO-Zero", r"-\sigma", r"1-\sigma"),
        ("NCA", r"\frac{1}{2}", r"\frac{1}{3}"),
        ("Cal-DPO", r"\sigma(r_w - r_l)", r"\sigma(\beta(r_w - r_l))"),
        ("Cal-DPO", "c[", "["),
    ],
)
def test_a_wrong_equation_is_noticed(name, right, wrong):
    cell = EQUATIONS[name][0]
    assert right in cell
    assert not equals_loss(cell.replace(right, wrong, 1), BY_NAME[name])


def test_every_table_has_every_method():
    names = [spec.name for spec in METHODS.values()]
    assert list(EQUATIONS) == list(NEEDS) == list(table_of("method", "loss, β = 1")) == names
    with_reference = [spec.name for spec in METHODS.values() if spec.needs_reference]
    assert list(table_of("method", "factor at $r = 0$")) == with_reference


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_is_what_the_table_says(method):
    spec = METHODS[method]
    name, kind, reference, normalized, *_ = NEEDS[spec.name]
    assert name == f"`{method}`" and kind == spec.kind
    assert (reference == "yes", normalized == "yes") == (spec.needs_reference, spec.score != "log_ratio")
    assert {reference, normalized} <= {"yes", "no"}
    assert dict(documented_options(method).values()) == options_of(method)


def test_the_numbers_are_what_the_command_prints():
    assert table() in PAGE


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_the_factors_at_the_reference_are_those_of_the_table(beta):
    for name, (cell,) in table_of("method", "factor at $r = 0$").items():
        options = {symbol: default for symbol, (_, default) in documented_options(BY_NAME[name]).items()}
        _, by_chosen, by_rejected = loss_and_gradients(BY_NAME[name], 0.0, 0.0, beta)
        factor = formula(cell)(beta=beta, **options)
        assert (-by_chosen.item(), by_rejected.item()) == pytest.approx((factor, factor))


def test_every_test_that_the_page_names_is_there():
    cited = set(re.findall(r"`(test_\w+)`", PAGE))
    known = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.M))
    assert len(cited) > 8 and cited <= known


def test_the_shifts_of_the_page_are_those_at_its_pair():
    documented = {name: float(value) for value, name in re.findall(r"(0\.\d{4}) \(([\w-]+)\)", PAGE)}
    assert set(documented) >= {"APO-Zero", "NCA", "Cal-DPO", "ASFT"}
    for name, value in documented.items():
        _, by_chosen, by_rejected = loss_and_gradients(BY_NAME[name], 0.7, -0.4, 1.0)
        assert value == pytest.approx((by_chosen + by_rejected).item(), abs=5e-5)


def test_simpo_without_its_target_is_dpo_on_mean_log_probs():
    w, lo = -3 * torch.rand(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    simpo = LOSSES["simpo"]
    torch.testing.assert_close(simpo(w, lo, 0.7, gamma_beta_ratio=0.0), LOSSES["dpo"](w, lo, 0.7))
    assert not torch.allclose(simpo(w, lo, 0.7, gamma_beta_ratio=0.5), LOSSES["dpo"](w, lo, 0.7))


@pytest.mark.parametrize("beta", [0.02, 0.3, 1.0, 5.0])
def test_ipo_nca_and_cal_dpo_are_least_where_the_page_says(beta):
    _, by_chosen, by_rejected = loss_and_gradients("ipo", 0.3 + 1 / (2 * beta), 0.3, beta)
    assert (by_chosen.item(), by_rejected.item()) == pytest.approx((0, 0), abs=1e-9)
    minimum = math.log(2) / beta
    _, by_chosen, by_rejected = loss_and_gradients("nca", minimum, -1.0, beta)
    assert by_chosen.item() == pytest.approx(0, abs=1e-12) and by_rejected > 0
    assert 1 / (1 + math.exp(-beta * minimum)) == pytest.approx(2 / 3)

    # Cal-DPO: along r_w = -r_l the derivative changes its sign between the ends named.
    def slope(score):
        _, by_chosen, by_rejected = loss_and_gradients("cal_dpo", score, -score, beta)
        assert by_chosen.item() == pytest.approx(-by_rejected.item())
        return by_chosen.item()

    target, margin = 1 / (2 * beta), 1 / (4 * options_of("cal_dpo")["calibration_weight"])
    assert slope(target) < 0 < slope(target + margin)


def test_the_figure_is_drawn(tmp_path):
    draw(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 50_000


def mini():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "src/data/mini_tldr_base"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def token_logps(model, prompt, response):
    """(prompt + response - 1,) of every token but the first."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.slow
def test_trls_losses_differ_as_the_page_says():
    """One step of TRL's own trainers on two pairs of different lengths, and what this project computes of them."""
    from benchmarks.trl_side import trl_trainer

    beta, references = 0.3, [(-40.0, -31.0), (-37.0, -52.0)]
    pairs = [
        SimpleNamespace(prompt=[5, 6, 7], responses=[[8, 9, 10, 11, 12], [13, 14, 15]]),
        SimpleNamespace(prompt=[20, 21], responses=[[22, 23, 24], [25, 26, 27, 28, 29, 30]]),
    ]
    model, _ = mini()
    per_token = [[token_logps(model, p.prompt, r) for r in p.responses] for p in pairs]
    w, lo = (
        torch.stack([logps[i][len(p.prompt) - 1 :].sum() for logps, p in zip(per_token, pairs, strict=True)])
        for i in (0, 1)
    )
    n_w, n_l = (torch.tensor([float(len(p.responses[i])) for p in pairs]) for i in (0, 1))
    reference_w, reference_l = torch.tensor(references).T

    def ours(method, beta=beta, **options):
        logps, tokens = torch.stack([w, lo], 1), torch.stack([n_w, n_l], 1)
        references_of = torch.tensor(references) if METHODS[method].needs_reference else None
        return preference_loss(method, beta, logps, tokens, references_of, options=options).loss.mean().item()

    def theirs(method, then=lambda trainer: None, **changes):
        job = {"method": method, "micro_batch": 2, "pairs": 2, "references": references}
        trainer, losses = trl_trainer(job, *mini(), pairs, 1, beta=beta, **changes), []
        then(trainer)
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: losses.append(loss := compute(*a, **k)) or loss
        trainer.train()
        return losses[0].item()

    assert theirs("dpo", loss_type="nca_pair") == pytest.approx(ours("nca"), rel=1e-4)
    assert theirs("dpo", loss_type="apo_zero") == pytest.approx(ours("apo_zero") + 1, rel=1e-4)
    means = ((w - reference_w) / n_w - (lo - reference_l) / n_l - 1 / (2 * beta)) ** 2
    assert theirs("dpo", loss_type="ipo") == pytest.approx(means.mean().item(), rel=1e-4)
    assert abs(means.mean().item() - ours("ipo")) > 1

    def gamma(trainer):
        trainer.simpo_gamma = 0.06

    def gamma_and_sft(trainer):
        trainer.simpo_gamma, trainer.cpo_alpha = 0.06, 0.7

    chosen = [logps[0][len(p.prompt) - 1 :] for logps, p in zip(per_token, pairs, strict=True)]
    simpo = ours("simpo", gamma_beta_ratio=0.06 / beta)
    assert theirs("simpo", gamma) == pytest.approx(simpo, rel=1e-4)
    assert theirs("simpo", gamma_and_sft) == pytest.approx(simpo - 0.7 * torch.cat(chosen).mean().item(), rel=1e-4)
    all_tokens = -torch.cat([logps[0] for logps in per_token]).mean().item()  # the prompt, too
    assert theirs("orpo") == pytest.approx(all_tokens + beta * ours("orpo", beta=1.0), rel=1e-4)

    # Where both responses have T tokens: T^-2 times the loss of sums with beta / T.
    even, tokens = torch.tensor([-3.0, -9.0]), 4.0
    loss_of_means = LOSSES["ipo"](even[:1] / tokens, even[1:] / tokens, beta)
    torch.testing.assert_close(loss_of_means, LOSSES["ipo"](even[:1], even[1:], beta / tokens) / tokens**2)


def test_odds_of_a_whole_sequences_probability_are_hardly_more_than_its_log_prob():
    summed = torch.tensor([-12.0, -60.0])
    torch.testing.assert_close(summed - log1mexp(summed), summed, rtol=1e-5, atol=1e-5)
