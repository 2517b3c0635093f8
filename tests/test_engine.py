"""Every engine - alone, data parallel, ZeRO - trains the same model, and goes on where it was killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from src.data.examples import Example
from src.errors import ConfigError
from src.model.packing import distribute_examples
from src.training.token_budget import max_token_budget
from tests.support.commands import ROOT, SMALL, environment, train

POINT = [*SMALL, "method=dpo", "beta=0.1", "trainer.max_tokens_per_micro_batch=512", "engine.precision=fp32"]
ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
TOLERANCE = (
    3e-4  # of any weight, learning rate 1e-3: sums in another order, through 12 steps of Adam (1.5e-4 on torch 2.11)
)


def together(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.Popen(
        [*launcher, "-m", "src.train", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder, kind="align"):
    (file,) = (folder / "store").glob(f"{kind}/*/model.safetensors")
    return load_file(file)


def distance(a, b):
    assert a.keys() == b.keys()
    assert {t.dtype for t in (*a.values(), *b.values())} == {torch.float32}
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def quality(folder):
    (file,) = (folder / "store").glob("evaluate/*/result.json")
    return json.loads(file.read_text())["quality"]["value"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(*POINT, f"output_dir={folder}")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_of_every_engine_train_what_one_process_does(engine, alone, tmp_path):
    finish(together(*POINT, f"engine={engine}", f"output_dir={tmp_path}"))
    for kind in ("sft", "align"):
        assert distance(weights(tmp_path, kind), weights(alone, kind)) < TOLERANCE
    assert quality(tmp_path) == quality(alone)
    # The control: what is compared moved by far more than the tolerance.
    assert distance(weights(alone, "sft"), weights(alone)) > 10 * TOLERANCE


def test_zero_in_one_process_is_that_too(alone, tmp_path):
    train(*POINT, "engine=zero3", f"output_dir={tmp_path}")
    assert distance(weights(tmp_path), weights(alone)) < TOLERANCE


def test_kill_9_of_one_process_and_the_same_command_again_gives_identical_weights(tmp_path):
    arguments = [*POINT, "engine=zero3", "trainer.align.epochs=3"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(together(*arguments, f"output_dir={calm}"))
    process = together(*arguments, f"output_dir={killed}")
    deadline = time.monotonic() + 120
    while not list((killed / "store").glob("align/.work/*/checkpoints/*/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not list((killed / "store").glob("align/*/DONE"))
    finish(together(*arguments, f"output_dir={killed}"))
    assert distance(weights(killed), weights(calm)) == 0
    (log,) = (killed / "store").glob("align/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(24))


def test_recomputed_activations_change_no_bit(alone, tmp_path):
    train(*POINT, "engine.activation_checkpointing=true", f"output_dir={tmp_path}")
    assert distance(weights(tmp_path), weights(alone)) == 0


def test_compiled_layers_train_the_same_model(tmp_path):
    # From the base model: one stage that is compiled instead of two.
    arguments = [*POINT, "init=base", "lr=1e-3", "trainer.align.max_steps=2"]
    train(*arguments, "engine.compile=true", "judge=none", "evaluation=preference", f"output_dir={tmp_path}")
    plain = tmp_path / "plain"
    train(*arguments, "judge=none", "evaluation=preference", f"output_dir={plain}")
    # The first steps of Adam go by a gradient's sign, and where it is nearly zero rounding decides that.
    assert distance(weights(tmp_path), weights(plain)) < TOLERANCE
    assert distance(weights(plain), load_file(ROOT / "src/data/mini_tldr_base/model.safetensors")) > 10 * TOLERANCE


def test_lora_trains_low_rank_differences_and_starts_at_the_reference(alone, tmp_path):
    train(*POINT, "model.lora.rank=4", f"output_dir={tmp_path}")
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


def test_lora_of_two_processes_is_that_of_one(tmp_path):
    arguments = [*POINT, "model.lora.rank=4", "trainer.sft.max_steps=2", "trainer.align.max_steps=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(*arguments, f"output_dir={one}")
    finish(together(*arguments, "engine=zero3", f"output_dir={two}"))
    assert distance(weights(one), weights(two)) < TOLERANCE


def test_steps_of_3e_7_move_weights_in_bf16_as_they_do_in_float32(tmp_path):
    """Master weights are float32: in bf16 ones such a step is below half of the last place, and nothing would move."""
    arguments = [
        *POINT,
        "lr=3e-7",
        "trainer.align.batch_size=8",
        "trainer.align.epochs=7",
        "trainer.align.max_steps=100",
        "trainer.sft.max_steps=4",
    ]
    moves = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        train(*arguments, f"engine.precision={precision}", f"output_dir={folder}")
        before, after = weights(folder, "sft"), weights(folder)
        moves[precision] = torch.cat([(after[n] - before[n]).flatten().double() for n in sorted(after)])
        in_bf16 = torch.cat([(after[n].bfloat16() - before[n].bfloat16()).flatten() for n in sorted(after)])
        assert (in_bf16 != 0).double().mean() < 0.1  # the control
    length = moves["bf16"].norm() / moves["fp32"].norm()
    direction = torch.nn.functional.cosine_similarity(moves["bf16"], moves["fp32"], dim=0)
    assert length == pytest.approx(1, abs=0.1) and direction > 0.8


# --- which process computes what ----------------------------------------------------------------------------------


def lengths_of(count, seed=0):
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3 * 400 + 3).int().tolist()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_a_step_is_split_alike_for_all_and_every_example_counts_once(processes, budget):
    lengths = lengths_of(200)
    chosen = list(range(30, 70))
    step = distribute_examples(lengths, chosen, budget, processes)
    assert step == distribute_examples(lengths, chosen, budget, processes)
    assert len({len(own) for own in step}) == 1, "as many micro-batches for each"
    assert sorted(i for own in step for m in own if not m.is_filler for i in m.indices) == chosen
    assert all(sum(lengths[i] for i in m.indices) <= budget or len(m.indices) == 1 for own in step for m in own)
    assert all(own[-1].counts for own in step), "gradients are exchanged in the last one"
    tokens = [sum(lengths[i] for m in own if not m.is_filler for i in m.indices) for own in step]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_process_with_nothing_left_to_split_repeats_one_that_does_not_count():
    long, short = distribute_examples([500, 100, 100, 100], [0, 1, 2, 3], 10, 2)
    assert [not m.is_filler for m in long] == [False, False, True] and [not m.is_filler for m in short] == [True] * 3


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_the_gradient_of_a_step_does_not_depend_on_budget_or_number_of_processes(processes, budget):
    from src.config.schema import MethodFields, Point
    from src.model.logprobs import sequence_logps
    from src.model.packing import pack
    from src.stages.align import make_loss_fn
    from src.training.loop import GlobalBatch
    from tests.support.small_models import make_model, random_pairs, relative

    model, examples = make_model(), random_pairs(9, 1)
    objective = make_loss_fn(Point(method=MethodFields("dpo"), beta=0.1), torch.randn(9, 2))
    lengths, size = [e.length for e in examples], GlobalBatch(9, 0)

    def gradient(steps):
        total = 0.0
        for own in steps:  # each process's, summed as the engines do: mean over processes of `processes` times the loss
            model.zero_grad()
            for micro_batch in own:
                batch = pack(examples, micro_batch.indices)
                loss, _ = objective(batch, *sequence_logps(model, batch), size)
                (loss * micro_batch.counts * len(steps)).backward()
            total = total + torch.cat([p.grad.flatten() for p in model.parameters()]) / len(steps)
        return total

    torch.manual_seed(0)
    whole = gradient(distribute_examples(lengths, range(9), 10**6, 1))
    assert relative(gradient(distribute_examples(lengths, range(9), budget, processes)), whole) < 1e-6


def test_the_token_budget_is_what_fits_and_an_example_that_does_not_is_an_error():
    def measure(tokens):
        return tokens, 7_000_000 + 1_000_000 * tokens  # a megabyte a token, and something that is always there

    assert max_token_budget(20 * 2**30, measure, longest=4096) == 16384
    assert max_token_budget(20 * 2**30 + 10**6, measure, longest=4096) == 16384, "a little more memory: the same budget"
    with pytest.raises(ConfigError, match="an example of 20000 tokens does not fit"):
        max_token_budget(20 * 2**30, measure, longest=20000)


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tmp_path):
    process = together(*POINT, "engine=ddp", "trainer.sft.batch_size=1", f"output_dir={tmp_path}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "trainer.sft.batch_size=1: below the number of processes, 2" in output


def test_one_example_alone_is_packed_as_it_is():
    assert Example((1, 2), ((3,), (4, 5))).length == 3
