"""docs/methods.md agrees with the code: its equations are evaluated, its numbers recomputed."""

import math
import re

import pytest
import sympy
import torch
import yaml
from sympy.parsing.sympy_parser import (
    convert_xor,
    implicit_multiplication_application,
    parse_expr,
    standard_transformations,
)

from benchmarks.methods import draw, loss_and_gradients, loss_options, table
from src.config.schema import CONF_DIR
from src.losses import LOSSES
from src.methods import METHODS, SCORES, options_of
from src.scores import log1mexp, sequence_score
from tests.support.commands import ROOT

PAGE = (ROOT / "docs/methods.md").read_text()
BY_NAME = {spec.name: method for method, spec in METHODS.items()}
# Of a score on the page; p is the exponential of its score.
SYMBOLS = {"log_ratio": "r", "mean_log_ratio": "m", "length_log_ratio": "d", "mean_log_prob": "p", "log_odds": "o"}
SYMBOLS |= {"alpha": "h", "forward_kl": "k"}


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
OF_SCORES = table_of("`method.score=`")


def formula(cell):
    """Return a function that evaluates $...$, the page's TeX, for values of its letters."""
    (tex,) = re.findall(r"^\$([^$]+)\$$", cell)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", tex).replace("[", "(").replace("]", ")")
    text = re.sub(r"\\log\\sigma", " log_sigma ", text)
    text = re.sub(r"\\([a-z]+)", r" \1 ", text)
    names = {name: sympy.Symbol(name) for name in re.findall(r"[a-z]\w*", text)}
    names |= {"log": sympy.log, "exp": sympy.exp, "max": sympy.Max, "sigma": lambda x: 1 / (1 + sympy.exp(-x))}
    names["log_sigma"] = lambda x: -sympy.log(1 + sympy.exp(-x))
    steps = (*standard_transformations, convert_xor, implicit_multiplication_application)
    parsed = parse_expr(text, local_dict=names, transformations=steps)
    return lambda **values: float(parsed.evalf(30, subs={str(s): values[str(s)] for s in parsed.free_symbols}))


def documented_options(method):
    """Return letter -> (name, default) of each option in the table."""
    cell = NEEDS[METHODS[method].name][-1]
    options = re.findall(r"`(\w+)` \(\$\\?(\w+)\$\): ([\d.]+)", cell)
    return {letter: (name, float(value)) for name, letter, value in options}


def documented_loss_options(method):
    return {
        letter: option for letter, option in documented_options(method).items() if option[0] in METHODS[method].options
    }


def equals_loss(cell, method):
    """Return whether an equation of the page equals the loss in code, at many scores, betas and options."""
    equation, symbol = formula(cell), SYMBOLS[METHODS[method].score]
    options = {sign: (name, 1.3 * default) for sign, (name, default) in documented_loss_options(method).items()}
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
        ("SLiC-HF", "0, 1", "0, 2"),
        ("Robust DPO", r"1 - 2\epsilon", r"1 - \epsilon"),
        ("cDPO", r"\epsilon\log\sigma(-\beta", r"\epsilon\log\sigma(\beta"),
        ("EXO-pair", r"\log(\epsilon)", r"\log(1 - \epsilon)"),
        ("DiscoPOP", r"\frac{\beta}{\tau}", r"\beta"),
        ("LN-DPO", "m_w", "r_w"),
        ("SPPO-hard", r"r_l + ", r"r_l - "),
        ("APO-Down", r"\beta(r_w - r_l)", r"\beta r_l"),
        ("DPOP", "-r_w", "r_w"),
    ],
)
def test_a_wrong_equation_is_noticed(name, right, wrong):
    cell = EQUATIONS[name][0]
    assert right in cell
    assert not equals_loss(cell.replace(right, wrong, 1), BY_NAME[name])


def test_every_table_has_every_method():
    names = [spec.name for spec in METHODS.values()]
    assert list(EQUATIONS) == list(NEEDS) == list(table_of("method", "loss, β = 1")) == names
    # Both named in the text: their gradients at the reference are not opposite.
    others = ("apo_down", "forward_kl_point")
    with_factor = [spec.name for m, spec in METHODS.items() if spec.needs_reference and m not in others]
    assert list(table_of("method", "factor at $r = 0$")) == with_factor
    for method in others:
        _, by_chosen, by_rejected = loss_and_gradients(method, *[score_at_reference(method)] * 2, 0.5)
        assert abs(by_chosen + by_rejected) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs_is_what_the_table_says(method):
    spec = METHODS[method]
    name, kind, reference, normalized, *_ = NEEDS[spec.name]
    assert name == f"`{method}`" and kind == spec.kind
    assert [reference, normalized] == OF_SCORES[f"`{spec.score}`"][1:3] and {reference, normalized} <= {"yes", "no"}
    assert set(dict(documented_options(method).values())) == set(options_of(method, spec.score))
    assert dict(documented_loss_options(method).values()) == loss_options(method)
    config = yaml.safe_load((CONF_DIR / "method" / f"{method}.yaml").read_text())
    assert dict(documented_options(method).values()) == {key: v for key, v in config.items() if key != "name"}


def documented_score(cell):
    """Return a function that evaluates the right side of a score's equation; log p is the mean log-prob."""
    return formula(f"${cell.strip('$').rpartition('=')[2]}$")


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_the_one_that_is_computed(name):
    assert list(OF_SCORES) == [f"`{score}`" for score in SCORES]
    spec, (cell, reference, normalized, signed, options) = SCORES[name], OF_SCORES[f"`{name}`"]
    assert (reference == "yes", signed == "yes") == (spec.needs_reference, spec.is_signed)
    letters = {letter: option for option, letter in re.findall(r"`(\w+)` \(\$\\?(\w+)\$\)", options)}
    assert set(letters.values()) == set(spec.options)
    u, v, tokens, value = -7.3, -5.1, 9.0, 0.3
    inputs = (torch.tensor([x], dtype=torch.float64) for x in (u, tokens, v))
    computed = sequence_score(name, *inputs, **dict.fromkeys(spec.options, value)).item()
    values = {"u": u, "v": v, "T": tokens} | dict.fromkeys(letters, value)
    assert documented_score(cell)(**values) == pytest.approx(computed, rel=1e-9)
    assert documented_score(cell)(**values | {"u": -7.4}) != pytest.approx(computed, rel=1e-9)
    doubled = (torch.tensor([x], dtype=torch.float64) for x in (2 * u, 2 * tokens, 2 * v))
    same = sequence_score(name, *doubled, **dict.fromkeys(spec.options, value)).item() == pytest.approx(computed)
    assert (normalized == "yes") == same


def test_the_numbers_are_what_the_command_prints():
    assert table() in PAGE


def score_at_reference(method):
    """Return the score of a response where the policy is its reference; its derivative by the log ratio is 1 there."""
    return -1.0 if METHODS[method].score == "forward_kl" else 0.0


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_the_factors_at_the_reference_are_those_of_the_table(beta):
    for name, (cell,) in table_of("method", "factor at $r = 0$").items():
        options = {symbol: default for symbol, (_, default) in documented_options(BY_NAME[name]).items()}
        _, by_chosen, by_rejected = loss_and_gradients(BY_NAME[name], *[score_at_reference(BY_NAME[name])] * 2, beta)
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

    target, margin = 1 / (2 * beta), 1 / (4 * loss_options("cal_dpo")["calibration_weight"])
    assert slope(target) < 0 < slope(target + margin)


def test_the_figure_is_drawn(tmp_path):
    draw(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 50_000


def test_odds_of_a_whole_sequences_probability_are_hardly_more_than_its_log_prob():
    summed = torch.tensor([-12.0, -60.0])
    torch.testing.assert_close(summed - log1mexp(summed), summed, rtol=1e-5, atol=1e-5)
