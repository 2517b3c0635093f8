"""Every engine - one process, DDP, FSDP2, ZeRO - trains the same model, and resumes after a kill."""

import json
from collections import Counter
from contextlib import closing
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file

from src.model.logprobs import sequence_logps
from src.model.packing import pack
from src.training.strategies import make_engine
from tests.support.commands import SMALL, train
from tests.support.configs import stage_of
from tests.support.small_models import make_model, random_pairs, relative
from tests.support.torchrun import finish, kill_rank_at, start_ranks

POINT = [*SMALL, "method=dpo", "beta=0.1", "trainer.max_tokens_per_micro_batch=512", "engine.precision=fp32"]
ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
# Distance of the trained weights from those of one process, relative to how far alignment moved them, from sums in
# another order.
TOLERANCE = 0.01


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder, kind="align"):
    (file,) = (folder / "store").glob(f"{kind}/*/model.safetensors")
    return load_file(file)


def distance(a, b):
    assert a.keys() == b.keys()
    assert {t.dtype for t in (*a.values(), *b.values())} == {torch.float32}
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def error(after, run):
    """Return the distance of aligned weights from those of a run, relative to how far its alignment moved them."""
    before, expected = weights(run, "sft"), weights(run)
    assert after.keys() == expected.keys()

    def movement(weights):
        return torch.cat([(weights[name] - before[name]).flatten().double() for name in sorted(before)])

    return float((movement(after) - movement(expected)).norm() / movement(expected).norm())


def quality(folder):
    (file,) = (folder / "store").glob("evaluate/*/result.json")
    return json.loads(file.read_text())["quality"]["value"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(*POINT, f"output_dir={folder}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_of_every_engine_train_what_one_process_does(engine, alone, tmp_path):
    finish(start_ranks(*POINT, f"engine={engine}", f"output_dir={tmp_path}"))
    assert error(weights(tmp_path), alone) < TOLERANCE
    assert quality(tmp_path) == quality(alone)


@pytest.mark.slow
def test_zero_in_one_process_is_deepspeed_and_trains_the_same_model(alone, tmp_path):
    # A partial run leaves its checkpoint, in which these files are DeepSpeed's, of a model sharded by ZeRO-3.
    train(*POINT, "engine=zero3", "trainer.align.stop_fraction=0.5", f"output_dir={tmp_path}")
    (checkpoint,) = (tmp_path / "store").glob("align/.work/*/checkpoints/*/step-00000004")
    assert checkpoint.parent.name == "zero3x1"
    names = {path.name for path in checkpoint.rglob("*")}
    assert {"zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"} <= names
    train(*POINT, "engine=zero3", f"output_dir={tmp_path}")
    full_run = max((tmp_path / "store").glob("align/*/model.safetensors"), key=lambda path: "@" not in str(path))
    assert error(load_file(full_run), alone) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_kill_9_of_one_process_and_the_same_command_again_gives_identical_weights(engine, tmp_path):
    arguments = [*POINT, f"engine={engine}", "trainer.align.epochs=3"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(start_ranks(*arguments, f"output_dir={calm}"))
    kill_rank_at("align/.work/*/checkpoints/*/step-*", 2, *arguments, f"output_dir={killed}")
    assert not list((killed / "store").glob("align/*/DONE"))
    finish(start_ranks(*arguments, f"output_dir={killed}"))
    assert distance(weights(killed), weights(calm)) == 0
    (log,) = (killed / "store").glob("align/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(24))


def gradients(model, examples):
    """Return the gradients of the summed log-probs of all responses, by parameter."""
    model.zero_grad()
    batch = pack(examples, range(len(examples)))
    sequence_logps(model, batch)[0].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def configured(model, *overrides):
    """Return the model as the engine of a run with these overrides configures it for training."""
    stage = stage_of("align", *overrides)
    with closing(make_engine(stage.resources, stage.inputs.trainer, stage.inputs.lora, seed=0)) as engine:
        return engine.configure_model(model).train()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_recomputes_every_layer_and_changes_no_bit_of_a_gradient(recompute):
    examples = random_pairs(5, 1)
    expected = gradients(make_model().train(), examples)
    model = configured(make_model(), f"engine.activation_checkpointing={recompute}")
    calls = Counter()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.update([module]))
    actual = gradients(model, examples)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    # Once in the forward pass; with checkpointing a second time in the backward pass.
    assert [calls[layer.mlp] for layer in model.model.layers] == [1 + recompute] * 3


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_layers_have_the_same_gradients(compiled, monkeypatch):
    """Traced by AOTAutograd and run in eager mode: what inductor generates is torch's own, and takes minutes here."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = make_model(num_hidden_layers=1).train()
    model = configured(make_model(num_hidden_layers=1), f"engine.compile={compiled}")
    for seed in (1, 2):  # batches of different lengths and layouts
        examples = random_pairs(5, seed)
        expected, actual = gradients(plain, examples), gradients(model, examples)
        for name in expected:
            assert relative(actual[name], expected[name]) < 1e-5, name
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert num_graphs > 0 if compiled else num_graphs == 0


@pytest.mark.slow
def test_lora_trains_low_rank_differences_and_starts_at_the_reference(alone, tmp_path):
    train(*POINT, "model.lora.rank=4", "model.lora.publish=merged", f"output_dir={tmp_path}")
    before, after = weights(tmp_path, "sft"), weights(tmp_path)
    assert before.keys() == weights(alone).keys(), "merged: an ordinary checkpoint"
    moved = 0
    for name, weight in after.items():
        difference = (weight - before[name]).double()
        if "proj" in name:
            sizes = torch.linalg.svdvals(difference)
            assert sizes[0] > 1e-4 and sizes[4] < 1e-3 * sizes[0], name
            moved += 1
        else:
            assert not difference.any(), name
    assert moved == 14
    (log,) = (tmp_path / "store").glob("align/*/metrics.jsonl")
    assert json.loads(log.read_text().splitlines()[0])["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.slow
def test_lora_of_two_processes_is_that_of_one(tmp_path):
    arguments = [
        *POINT,
        "model.lora.rank=4",
        "model.lora.publish=merged",
        "trainer.sft.max_steps=2",
        "trainer.align.max_steps=4",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    train(*arguments, f"output_dir={one}")
    finish(start_ranks(*arguments, "engine=zero3", f"output_dir={two}"))
    assert error(weights(two), one) < TOLERANCE


# --- which rank computes what ----------------------------------------------------------------------------------


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tmp_path):
    process = start_ranks(*POINT, "engine=ddp", "trainer.sft.batch_size=1", f"output_dir={tmp_path}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "trainer.sft.batch_size=1: below the number of processes, 2" in output
