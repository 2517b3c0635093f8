"""The minimal detectable difference: arithmetic against simulation and published sizes, variances, and the commands."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.aggregation import make_sweep
from benchmarks.power import normal_study, resampled_study, share_false, simulated_difference
from src.config.tables import MAX_ROWS
from src.errors import ConfigError
from src.estimates.power import (
    DEFAULT,
    Components,
    Design,
    minimal_difference,
    minimal_difference_of_trainings,
)
from src.planning.plan import make_plan
from src.store.files import write_json, write_jsonl
from src.store.store import QUALITY_FILE, RESULT_SCHEMA, VERDICTS_FILE, Store
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.power import comparisons, judge_dollars, power_sentences
from sweeps.analysis.results import collect
from sweeps.analysis.spread import Spread, Tokens, components_of, judge_tokens, spread_in_store, spread_of
from tests.support.commands import ROOT, dry_run, environment, run_in_process
from tests.support.configs import point

TOKENS = Tokens(read=500.0, written=50.0)
COMPONENTS = Components(prompts=0.03, samples=0.02, seeds=0.001)


@pytest.fixture
def finished(tmp_path):
    """Return the folder of a finished sweep of two methods and three seeds, whose command is one of src.train."""

    def make(seeds=3, **options):
        folder = make_sweep(tmp_path, seeds=seeds, lrs=1, betas=1, setup="mini_tldr", methods=("dpo", "ipo"), **options)
        command = "python -m src.train -m method=dpo,ipo beta=0.1 lr=1e-3 seed=0,1"
        folder.write(folder.read() | {"finished": "2026-01-01", "command": command})
        return folder

    return make


def power(*arguments):
    return run_in_process("-m", "hydra/sweeper=power", "engine.gpu=null", *arguments)


def rows(text):
    """Return the rows of the table: prompts, reported, seeds, difference, any seeds, dollars, hours."""
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit() and len(line.split()) == 7]


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_the_smallest_studies_are_the_published_ones(effect, pairs):
    """Pairs for 80 % power in a two-sided t-test at 5 %, by G*Power 3.1 (matched pairs, dz)."""
    of_unit_variance = Components(1.0, 0.0, 0.0)
    assert minimal_difference(of_unit_variance, Design(pairs)) <= effect
    assert minimal_difference(of_unit_variance, Design(pairs - 1)) > effect


def test_computed_and_simulated_differences_agree_and_without_holm_they_do_not():
    design = Design(prompts=40, seeds=2, methods=4)
    simulated = simulated_difference(normal_study(COMPONENTS, design), minimal_difference(COMPONENTS, design), 200)
    assert minimal_difference(COMPONENTS, design) == pytest.approx(simulated, rel=0.1)
    without_holm = minimal_difference(COMPONENTS, replace(design, methods=2))
    assert without_holm != pytest.approx(simulated, rel=0.2)
    one_seed = minimal_difference(COMPONENTS, replace(design, seeds=1))
    assert one_seed != pytest.approx(simulated, rel=0.1)


def test_the_paired_test_takes_the_variance_between_seeds_for_differences():
    design = Design(prompts=100, seeds=1, methods=3)
    apart = replace(COMPONENTS, seeds=0.005)
    assert share_false(normal_study(apart, design), 100) < 0.15
    assert share_false(normal_study(apart, design, with_seeds=True), 100) > 0.5


def test_studies_drawn_from_a_sweeps_prompts_have_methods_of_one_mean():
    values = np.random.default_rng(0).random((3, 50)) + np.arange(3)[:, None]
    draw, generator = resampled_study(values), np.random.default_rng(0)
    assert np.mean([draw(generator).mean(1) for _ in range(300)], axis=0) == pytest.approx([0, 0, 0], abs=0.02)


def test_more_prompts_seeds_and_fewer_methods_show_smaller_differences():
    for function in (minimal_difference, minimal_difference_of_trainings):
        for name, values in (
            ("prompts", [2, 3, 10, 1000, 10**6]),
            ("seeds", [1, 2, 5, 50]),
            ("methods", [30, 8, 3, 2]),
        ):
            found = [function(COMPONENTS, replace(Design(256, 3, 8), **{name: value})) for value in values]
            assert found == sorted(found, reverse=True) and len(set(found)) == len(found), name
    # Where samples do not vary, the report's test gains nothing by seeds; a claim about methods does.
    steady = replace(COMPONENTS, samples=0.0)
    one, many = Design(256, 1, 8), Design(256, 9, 8)
    assert minimal_difference(steady, one) == minimal_difference(steady, many)
    assert minimal_difference_of_trainings(steady, one) > minimal_difference_of_trainings(steady, many)
    assert minimal_difference(Components(0, 0, 0), one) == 0
    assert math.isnan(minimal_difference_of_trainings(replace(COMPONENTS, seeds=math.nan), one))


def test_many_prompts_need_the_normal_approximations_difference():
    normal = (norm.isf(0.05 / 28 / 2) + norm.isf(0.2)) * math.sqrt(0.05 / 10**6)
    assert minimal_difference(COMPONENTS, Design(10**6, 1, 8)) == pytest.approx(normal, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Design(1), "prompts=1: at least 2"),
        (lambda: Design(10, 0), "seeds=0"),
        (lambda: Design(10, 1, 0), "methods=0"),
        (lambda: Components(-1.0, 0, 0), "variance of prompts=-1"),
        (lambda: Components(0, math.nan, 0), "variance of samples=nan"),
        (lambda: Components(0, 0, math.inf), "variance of seeds=inf"),
        (lambda: minimal_difference(DEFAULT, Design(10), power=1.0), "power=1: both must lie between"),
        (lambda: minimal_difference(DEFAULT, Design(10), level=0.9), "level=0.9"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_variance_components_are_recovered():
    generator, seeds, prompts = np.random.default_rng(0), 30, 3000
    drawn = 0.3 * generator.normal(size=prompts) + 0.1 * generator.normal(size=(seeds, 1))
    found = components_of(0.05 + drawn + 0.2 * generator.normal(size=(seeds, prompts)))
    assert found.prompts == pytest.approx(0.09, rel=0.1)
    assert found.samples == pytest.approx(0.04, rel=0.05)
    assert found.seeds == pytest.approx(0.01, rel=0.5)
    one = components_of(drawn[:1])
    assert one.prompts + one.samples == pytest.approx(drawn[0].var(ddof=1)) and math.isnan(one.seeds)
    assert components_of(generator.normal(size=(2, 500))).prompts < 0.2, "samples are not taken for prompts"


def test_the_variance_is_that_of_the_setup_and_metric_in_a_finished_sweep(finished, tmp_path, capsys):
    folder = finished()
    spread = spread_in_store(tmp_path, "mini_tldr", "win_rate")
    assert spread == spread_of(collect([folder]), "mini_tldr", "win_rate")
    assert (spread.num_pairs, spread.num_seeds, spread.num_prompts) == (1, 3, 256)
    quality = [collect([folder]).prompts.reporting([[f"{m}-0-0-{s}"] for s in range(3)]) for m in ("dpo", "ipo")]
    assert spread.components == components_of(quality[0] - quality[1]) and spread.components.samples > 0
    assert spread_in_store(tmp_path, "other", "win_rate") is None
    assert spread_in_store(tmp_path, "mini_tldr", "accuracy") is None
    folder.write(folder.read() | {"finished": None})
    assert spread_in_store(tmp_path, "mini_tldr", "win_rate") is None, "it still runs"
    folder.write(folder.read() | {"finished": "2026-01-01"})
    for path in (tmp_path / "store" / "evaluate").glob(f"ipo*/{QUALITY_FILE}"):
        path.write_text("{")
    assert spread_in_store(tmp_path, "mini_tldr", "win_rate") is None, "damaged results are none"
    folder.record.write_text("{")
    assert spread_in_store(tmp_path, "mini_tldr", "win_rate") is None
    assert "the power estimate does without this sweep" in capsys.readouterr().err


def test_a_sweep_with_more_seeds_is_asked_unless_one_is_named(finished, tmp_path):
    folder = finished()
    record = folder.read()
    newer = SweepFolder(folder.path.with_name("newer"))
    newer.write(
        record | {"name": "newer", "finished": "2026-02-01", "points": [p for p in record["points"] if p["seed"] == 0]}
    )
    assert spread_in_store(tmp_path, "mini_tldr", "win_rate").num_seeds == 3
    named = spread_in_store(tmp_path, "mini_tldr", "win_rate", newer)
    assert named.num_seeds == 1 and named.source.startswith("sweep newer")
    assert named.components.seeds == DEFAULT.seeds


def test_a_dry_run_says_what_the_sweep_can_show(finished, tmp_path):
    _, text = dry_run("method=dpo,ipo,nca", "beta=0.1,1")
    expected = minimal_difference(DEFAULT, Design(256, 1, 3))
    assert f"256 reporting prompts and 1 seed show a difference of win_rate of {expected:.3f} between two of 3" in text
    assert "Holm over 3 pairs) (variance: a stated default" in text
    assert "power:" not in dry_run("method=dpo", "beta=0.1")[1], "nothing is compared"
    spread = spread_of(collect([finished()]), "mini_tldr", "win_rate")
    _, measured = dry_run("method=dpo,ipo,nca", "beta=0.1", "seed=0,1", f"output_dir={tmp_path}")
    expected = minimal_difference(spread.components, Design(256, 2, 3))
    assert f"2 seeds show a difference of win_rate of {expected:.3f}" in measured and "sweep synthetic" in measured


def test_the_command_shows_what_more_prompts_and_seeds_would_show(finished, tmp_path):
    folder = finished()
    command = [sys.executable, "-m", "sweeps.power"]
    done = subprocess.run(
        [*command, str(folder.path), "seed=0"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    table = rows(done.stdout)
    assert [row[:3] for row in table] == [
        *(["512", "256", "1"], ["1024", "512", "1"], ["2048", "1024", "1"]),
        *(["512", "256", "2"], ["512", "256", "4"], ["1024", "512", "2"]),
    ]
    components = spread_of(collect([folder]), "mini_tldr", "win_rate").components
    for row in table:
        assert row[3] == f"{minimal_difference(components, Design(int(row[1]), int(row[2]), 2)):.3f}"
    assert {row[6] for row in table} == {"-"} and "accelerator-hours: not known: needs one finished run" in done.stdout
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert rows(power("method=dpo,ipo", "beta=0.1", "seed=0", "lr=1e-3", f"output_dir={tmp_path}").stdout) == table
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, "nothing is written"


def test_prompts_of_a_benchmarks_file_are_not_multiplied(tmp_path):
    few = [point(f"method={method}", f"output_dir={tmp_path}") for method in ("dpo", "ipo")]
    (one,) = comparisons(few)
    assert one.enlarged(2, 1).num_prompts == 1024 and one.enlarged(MAX_ROWS, 1) is None
    for each in few:
        each.evaluation.prompts_file = "alpaca_eval.json"
    assert one.enlarged(2, 1) is None and len(one.enlarged(1, 3).points) == 6
    assert {p.seed for p in one.enlarged(1, 3).points} == {0, 1, 2}
    by_pairs = comparisons([point(f"method={m}", "evaluation.metric=reward_accuracy") for m in ("dpo", "ipo")])[0]
    assert by_pairs.design().prompts == 128 and by_pairs.enlarged(2, 1).design().prompts == 256


def test_no_more_prompts_are_counted_than_the_data_has(tmp_path):
    pairs = ({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(200))
    write_jsonl(tmp_path / "pairs.jsonl", pairs)  # of which a tenth is held out

    def compared(*overrides):
        options = ["setup=smollm2_jsonl", "model=mini", f"dataset.path={tmp_path}/pairs.jsonl", "beta=0.1", "lr=1e-5"]
        return comparisons([point(f"method={method}", *options, *overrides) for method in ("dpo", "ipo")])[0]

    samples = compared("evaluation.num_prompts=1000")
    few, most = (compared("evaluation.metric=reward_accuracy", f"dataset.validation_size={n}") for n in (40, 150))
    assert [one.num_prompts for one in (samples, few, most)] == [20, 40, 150]
    assert few.enlarged(2, 1).num_prompts == 80 and samples.enlarged(2, 1) is most.enlarged(2, 1) is None


def test_judge_dollars_are_those_of_the_verdicts_that_are_missing(tmp_path):
    asked = ["judge=tldr", "judge.model=m", "judge.input_price=2", "judge.output_price=8", f"output_dir={tmp_path}"]
    of_methods = [point(f"method={method}", *asked) for method in ("dpo", "ipo")]
    points = [replace(each, beta=beta) for each in of_methods for beta in (0.1, 1.0)]

    def dollars(tokens=TOKENS, **changes):
        for each in points:
            each.judge = replace(of_methods[0].judge, **changes)
        spread = Spread(DEFAULT, "", judge_tokens={} if tokens is None else {"tldr": tokens})
        return judge_dollars(comparisons(points)[0], make_plan(points, Store(tmp_path)), spread)

    of_prompt = (500 * 2 + 50 * 8) / 1e6
    assert dollars()[0] == pytest.approx(4 * 512 * of_prompt)
    assert dollars(reporting="selected")[0] == pytest.approx((4 * 256 + 2 * 256) * of_prompt)
    assert dollars(name="gold") == (0.0, ""), "the embedded judge costs nothing"
    unknown, reason = dollars(input_price=None)
    assert math.isnan(unknown) and "judge.input_price" in reason
    unknown, reason = dollars(tokens=None)
    assert math.isnan(unknown) and "known once judge=tldr" in reason


def test_tokens_of_a_judge_are_means_over_prompts(finished):
    folder = finished(seeds=1)
    judged = dict.fromkeys(("sample", "turn", "value", "length"), [0] * 512) | {"first": [[1.0]] * 512}
    judged |= {"metric": "win_rate", "index": list(range(512))}
    verdicts = {"schema": RESULT_SCHEMA, "selection": [], "judges": {"tldr": judged}}
    write_json(folder.store.root / "evaluate" / "dpo-0-0-0" / VERDICTS_FILE, verdicts)
    results = collect([folder])
    usage = {"answers": 1024, "calls": 1000, "prompt_tokens": 512_000, "completion_tokens": 5120}
    half = {"answers": 512, "calls": 500, "prompt_tokens": 256_000, "completion_tokens": 2560}
    results.usages += [("tldr", usage), ("tldr", half), ("gold", {"scores": {}})]
    assert judge_tokens(results) == {"tldr": Tokens(1000.0, 10.0)}


def test_what_cannot_be_said_is_one_line(finished, tmp_path):
    found = [point(f"method={method}", f"output_dir={tmp_path}") for method in ("dpo", "ipo")]
    for each in found:
        each.evaluation.metric = "rating"
    (sentence,) = power_sentences(found, Store(tmp_path))
    assert sentence.startswith("power: not known before a sweep of this setup has finished (rating)")
    folder = finished(seeds=1)
    refused = [
        (["method=dpo", f"output_dir={tmp_path}"], "the sweep compares nothing"),
        (["method=dpo,ipo", "evaluation.num_prompts=2"], "the sweep compares nothing"),
        (["method=nosuch"], "method/nosuch does not exist"),
        (["method=dpo,ipo", "hydra.sweeper.standard_deviation=-1"], "standard_deviation=-1"),
        (["method=dpo,ipo", f"hydra.sweeper.folder={tmp_path}"], "no sweep.json in it"),
    ]
    for arguments, message in refused:
        done = power(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    wrong = [
        ([str(tmp_path / "none")], "no sweep.json in it"),
        ([str(folder.path), str(folder.path)], "a second folder"),
        ([str(folder.path), "--sd", "0"], "--sd 0: must be a positive number"),
        (["--sd", "x", "method=dpo"], "--sd"),
        ([], "required: DIR or OVERRIDE"),
    ]
    for arguments, message in wrong:
        done = run_in_process(*arguments, module="sweeps.power")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    folder.write(folder.read() | {"command": "synthetic"})
    done = run_in_process(folder.path, module="sweeps.power")
    assert done.returncode == 2 and "give overrides instead of the folder" in done.stderr
    given = power("method=dpo,ipo", "hydra.sweeper.standard_deviation=0.3", f"output_dir={tmp_path}").stdout
    assert (
        f"of win_rate of {minimal_difference(Components(0.09, 0, 0), Design(256)):.3f}" in given and "--sd 0.3" in given
    )
