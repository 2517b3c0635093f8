"""What a dry run says one process holds, and the refusal of plans that do not fit the card they are planned for."""

import math

import pytest

from launchers.local import LocalLauncher
from src.config.schema import Engine
from src.errors import ConfigError
from src.estimates import card, forecast
from src.estimates.forecast import Forecast
from src.estimates.load import load_of
from src.planning.plan import make_plan
from src.rehearsal.request import Result
from src.store.store import Store
from tests.support.commands import run_in_process
from tests.support.configs import point, stage_of
from tests.support.forecasts import memory_table

GIB = 2**30
TLDR, UF = ["setup=llama32_3b_tldr", "beta=0.1"], ["setup=llama31_8b_uf", "beta=0.1"]
GPUS = "hydra.launcher.nodes", "hydra.launcher.gpus_per_node"
ENGINE = "engine", "engine.precision", "engine.activation_checkpointing"


@pytest.fixture
def rehearsals(monkeypatch):
    """Rehearsals with the results that a test gives for a request; every list of requests that was asked for."""
    asked, results = [], {}

    def rehearse_all(requests):
        asked.append(list(requests))
        return [results.get((r.stage, r.ranks), Result(peak=50 * GIB, tokens=100, seconds=1.0)) for r in requests]

    monkeypatch.setattr(forecast, "rehearse_all", rehearse_all)
    return asked, results


def dry_run(tmp_path, *overrides):
    return run_in_process("-m", "dry_run=true", f"output_dir={tmp_path}", *overrides)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3_offload", "fsdp"])
def test_what_is_rehearsed_as_a_strategy_that_holds_more_is_not_refused_by_its_rehearsal(engine, rehearsals, tmp_path):
    _, results = rehearsals
    results["align", 8] = Result(error="an example of 8071 tokens does not fit into the memory of the GPU")
    done = dry_run(tmp_path, *UF, f"engine={engine}", "engine.gpu=h200", "hydra/launcher=slurm_8gpu")
    if engine == "fsdp":  # the control
        assert done.returncode == 2 and "an example of 8071 tokens does not fit" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        table = memory_table(done.stdout)
        assert table["align"]["s a step"] == "-" != table["reference"]["s a step"]
        assert (table["align"]["source"], table["reference"]["source"]) == ("arithmetic", "rehearsed")
        assert f"\narithmetic: training with {engine}\n" in done.stdout


def test_a_model_that_does_not_fit_is_refused_also_where_no_length_of_a_row_is_known(rehearsals, tmp_path):
    """Such stages and their remedies cannot be rehearsed."""
    unknown = [f"dataset.{table}.{key}=null" for table in ("sft", "preference") for key in ("tokens", "prompt_tokens")]
    done = dry_run(tmp_path, *UF, "dataset=hh_rlhf", *unknown, "judge=none", "evaluation=preference")
    assert done.returncode == 2 and "does not fit on one h100" in done.stderr, done.stderr
    assert "hydra.launcher.gpus_per_node=2 fits" in done.stderr
    assert not any(request.stage == "sft" for requests in rehearsals[0] for request in requests)


def test_the_table_has_what_each_process_of_each_stage_holds(arithmetic, tmp_path):
    done = dry_run(tmp_path, *TLDR)
    assert done.returncode == 0, done.stderr
    table = memory_table(done.stdout)
    assert set(table) == {"sft", "reference", "align", "generate"}
    weights = 4 * 3_212_749_824 / GIB
    lasting = [table["align"][name] for name in ("weights", "gradients", "optimizer")]
    assert lasting == [f"{weights:.1f}", f"{weights:.1f}", f"{2 * weights:.1f}"]
    scored = [table["reference"][name] for name in ("weights", "gradients", "optimizer")]
    assert scored == [f"{weights / 2:.1f}", "-", "-"]  # bf16, and nothing is trained
    assert float(table["generate"]["KV cache"]) == pytest.approx(64 * (896 + 256) * 114_688 / GIB, abs=0.05)
    assert "h100 has 79.1, of which 71.2 may be taken" in done.stdout
    assert "arithmetic: g++ is not on PATH" in done.stdout and table["sft"]["source"] == "arithmetic"
    smaller = memory_table(dry_run(tmp_path, *TLDR, "evaluation.generation.batch_size=8").stdout)
    assert float(smaller["generate"]["KV cache"]) == pytest.approx(float(table["generate"]["KV cache"]) / 8, abs=0.1)


def test_a_plan_that_does_not_fit_is_refused_in_one_line_that_names_what_fits(arithmetic, tmp_path):
    done = dry_run(tmp_path, *TLDR, "engine.gpu=a100_40")
    assert done.returncode == 2 and memory_table(done.stdout)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: sft of llama32_3b with engine=fsdp does not fit on one a100_40 (39.4 GiB)")
    assert "; hydra/launcher=slurm hydra.launcher.gpus_per_node=2 fits, with " in line
    assert " or model.lora.rank=16 fits, with " in line
    assert dry_run(tmp_path, *TLDR, "engine.gpu=a100_80").returncode == 0


@pytest.mark.parametrize(
    ("kind", "overrides", "keys"),
    [
        (
            "align",
            ["engine.gpu=a100_40", "dataset.max_prompt_tokens=400"],
            {*GPUS, "hydra/launcher", "dataset.max_tokens", "model.lora.rank"},
        ),
        (
            "align",
            ["engine=single", "engine.activation_checkpointing=false"],
            {*GPUS, "hydra/launcher", *ENGINE, "model.lora.rank"},
        ),
        ("generate", ["evaluation.generation.batch_size=512"], {"evaluation.generation.batch_size"}),
    ],
)
def test_every_remedy_is_accepted_by_the_config_and_is_what_was_tried(kind, overrides, keys):
    load = load_of(stage_of(kind, *TLDR, *overrides), 1)
    named, points = set(), {}
    for remedy, changed in load.remedies(LocalLauncher().on_gpus):
        settings = dict(setting.split("=") for setting in remedy.split())
        named |= set(settings)
        assert changed.ranks == math.prod(int(settings.get(key, 1)) for key in GPUS)
        settings_of_point = tuple(f"{key}={value}" for key, value in settings.items() if not key.startswith("hydra"))
        if settings_of_point not in points:
            points[settings_of_point] = point(*TLDR, *overrides, *settings_of_point)
        for part in ("model", "dataset", "evaluation"):
            assert getattr(points[settings_of_point], part) == getattr(changed.point, part), remedy
        for key in ("strategy", "precision", "activation_checkpointing", "gpu"):
            assert getattr(points[settings_of_point].engine, key) == getattr(changed.point.engine, key), remedy
    assert named == keys


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(arithmetic, tmp_path):
    by_launcher = "hydra/launcher=slurm hydra.launcher.gpus_per_node=2"
    by_torchrun = "torchrun --standalone --nproc-per-node 2 -m src.train"
    for arguments, two in ((["-m", *TLDR], by_launcher), (TLDR, by_torchrun)):
        done = run_in_process(*arguments, "engine.gpu=a100_40", f"output_dir={tmp_path / 'out'}")
        assert done.returncode == 2 and f"; {two} fits, with " in done.stderr, done.stderr
        assert not list((tmp_path / "out").glob("s*/*"))  # neither store nor sweeps


def test_shards_on_several_gpus_fit_where_one_does_not(arithmetic, tmp_path):
    alone = dry_run(tmp_path, *UF)
    assert alone.returncode == 2 and "does not fit on one h100" in alone.stderr
    eight = dry_run(tmp_path, *UF, "hydra/launcher=slurm_8gpu")
    assert eight.returncode == 0, eight.stderr
    processes = {stage: row["processes"] for stage, row in memory_table(eight.stdout).items()}
    assert processes == {"sft": "8", "reference": "1", "align": "8", "generate": "1"}, "in a job of its own: auto"


def test_samples_that_do_not_fit_are_refused_with_the_batch_size_that_does(rehearsals, tmp_path):
    _, results = rehearsals
    results["generate", 1] = Result(peak=90 * GIB, tokens=1, seconds=1.0)

    done = dry_run(tmp_path, *TLDR)
    assert done.returncode == 2 and "generate of llama32_3b" in done.stderr and "it takes 90.0 GiB" in done.stderr
    # No smaller batch fits either, as every rehearsal of this test takes 90 GiB.
    assert "choose another card" in done.stderr
    generate = load_of(stage_of("generate", *UF, "engine.gpu=a100_40"), 1)
    assert generate.problem is not None
    remedy = next(remedy for remedy, changed in generate.remedies(str) if changed.problem is None)
    assert remedy == "evaluation.generation.batch_size=16"


def test_what_a_rehearsal_cannot_fit_is_refused_with_the_first_remedy_that_a_rehearsal_fits(rehearsals, tmp_path):
    asked, results = rehearsals
    failed = Result(error="an example of 1669 tokens does not fit into the memory of the GPU: use engine=fsdp with ...")
    results["align", 1] = results["align", 2] = failed
    done = dry_run(tmp_path, *TLDR)
    assert done.returncode == 2 and "an example of 1669 tokens does not fit into the memory of the GPU; " in done.stderr
    assert "hydra.launcher.gpus_per_node=4 fits, with 50.0 GiB in each process\n" in done.stderr
    tried = [(r.strategy, r.ranks, r.lora and r.lora["rank"]) for (r,) in asked[1:]]
    assert tried == [("fsdp", 2, None), ("fsdp", 4, None), ("fsdp", 1, 16)]


def test_the_limit_of_a_rehearsed_peak_is_the_one_that_the_table_names(rehearsals, tmp_path):
    _, results = rehearsals
    for peak, code in ((71.0, 0), (71.4, 2)):
        results["generate", 1] = Result(peak=int(peak * GIB), tokens=1, seconds=1.0)
        done = dry_run(tmp_path, *TLDR)
        assert done.returncode == code and "h100 has 79.1, of which 71.2 may be taken" in done.stdout


def test_another_error_of_a_rehearsal_is_shown_and_is_no_refusal(rehearsals, tmp_path):
    _, results = rehearsals
    results["align", 1] = Result(error="RuntimeError: mat1 is on cpu in aten.mm at src/model/x.py:3")
    done = dry_run(tmp_path, *TLDR)
    assert done.returncode == 0 and "align: RuntimeError: mat1 is on cpu" in done.stdout


def test_points_that_hold_the_same_are_rehearsed_once(rehearsals, tmp_path):
    asked, _ = rehearsals
    done = dry_run(tmp_path, "setup=llama32_3b_tldr", "method=dpo,simpo", "beta=0.1,1", "lr=1e-6")
    assert done.returncode == 0 and len(asked) == 1
    assert [request.stage for request in asked[0]] == ["sft", "reference", "align", "generate"]
    asked.clear()
    assert dry_run(tmp_path, *TLDR, "server=vllm", "judge=none").returncode == 0
    assert "generate" not in {request.stage for request in asked[0]}, "a server samples"
    asked.clear()
    limits = dry_run(tmp_path, *TLDR, "evaluation.generation.max_new_tokens=64,128")
    assert limits.returncode == 0 and [r.new_tokens for r in asked[0] if r.stage == "generate"] == [64, 128]


def test_a_run_is_rehearsed_only_where_arithmetic_leaves_a_doubt(rehearsals, tmp_path):
    asked, _ = rehearsals

    def forecast_of(*overrides):
        store = Store(tmp_path)
        plan = make_plan([point(*overrides, f"output_dir={tmp_path}")], store)
        asked.clear()
        return Forecast(plan, lambda stage: 1, all_rehearsed=False)

    forecast_of("engine.gpu=h100")  # the model of 280k parameters
    assert not asked
    forecast_of(*TLDR)
    assert [request.stage for request in asked[0]] == ["sft", "align"]


def test_the_card_is_the_one_named_else_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "_DRIVER", tmp_path)
    card._card_of_machine.cache_clear()
    assert card.card_of(Engine(name="e")) is None
    assert card.card_of(Engine(name="e", gpu="l40s")).name == "l40s"
    with pytest.raises(ConfigError, match=r"engine\.gpu=h1000: not in conf/gpus\.yaml"):
        card.card_of(Engine(name="e", gpu="h1000"))
    models = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100_40", "NVIDIA A100 80GB PCIe": "a100_80"}
    models |= {"NVIDIA GeForce RTX 4090": "rtx_4090", "NVIDIA L40S": "l40s", "NVIDIA H200": "h200"}
    (tmp_path / "0000:01:00.0").mkdir()
    for model, name in models.items():
        card._card_of_machine.cache_clear()
        (tmp_path / "0000:01:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ: 16\n")
        assert card.card_of(Engine(name="e")).name == name
        assert card.card_of(Engine(name="e", device="cpu")) is None
    card._card_of_machine.cache_clear()
