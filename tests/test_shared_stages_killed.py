"""Kill -9 of one of several ranks while they sample or score, and the same again: the results of one process."""

import shutil

import pytest

from tests.support.artifacts import results
from tests.support.commands import SMALL, train
from tests.support.torchrun import finish, kill_rank_at, start_ranks

pytestmark = pytest.mark.slow

POINT = [
    *(*SMALL, "method=dpo", "beta=0.1", "engine.precision=fp32", "engine.cpu_threads=1"),
    *("trainer.max_tokens_per_micro_batch=256", "evaluation.generation.batch_size=2"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return an output_dir in which one process has computed everything."""
    folder = tmp_path_factory.mktemp("alone")
    train(*POINT, f"output_dir={folder}")
    return folder


def kill_after_a_batch(name, folder, *arguments):
    """Start two ranks and kill the second before it saves its second batch; return the files of both ranks' rows."""
    kill_rank_at(f".work/*/checkpoints/{name}-1.jsonl", 2, *arguments, "engine=ddp", f"output_dir={folder}")
    (file,) = (folder / "store").glob(f"*/.work/*/checkpoints/{name}-1.jsonl")
    return sorted(file.parent.glob(f"{file.name.removesuffix('-1.jsonl')}*.jsonl"))


def test_a_killed_rank_costs_a_batch_whatever_number_of_ranks_goes_on(alone, tmp_path):
    """Training is left as one process computed it: two ranks sum gradients in another order."""
    shutil.copytree(alone / "store", tmp_path / "store")
    for kind in ("generate", "evaluate"):
        shutil.rmtree(tmp_path / "store" / kind)
    parts = kill_after_a_batch("responses", tmp_path, *POINT)
    sampled = sum(part.read_bytes().count(b"\n") for part in parts)
    again = tmp_path / "runs" / "again"
    kill_after_a_batch("scores-*", tmp_path, *POINT, f"hydra.run.dir={again}")
    assert f"{sampled} of 16 responses were sampled before" in (again / "train.log").read_text() and 0 < sampled < 16
    assert not list((tmp_path / "store").glob("evaluate/*/DONE"))
    third = tmp_path / "runs" / "third"
    arguments = [*POINT, "engine=ddp", f"output_dir={tmp_path}", f"hydra.run.dir={third}"]
    finish(start_ranks(*arguments, num_ranks=3))
    assert "16 of 16 responses were sampled before" in (third / "train.log").read_text()
    assert results(tmp_path) == results(alone)


def test_a_rank_killed_in_the_reference_log_probs_and_the_same_command_again_changes_nothing(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(start_ranks(*POINT, "engine=ddp", f"output_dir={calm}"))
    kill_after_a_batch("logps-train", killed, *POINT)
    assert not list((killed / "store").glob("reference/*/DONE"))
    finish(start_ranks(*POINT, "engine=ddp", f"output_dir={killed}"))
    assert results(killed) == results(calm)
