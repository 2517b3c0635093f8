"""Runs that are killed at any moment or started twice at once have the results of an undisturbed run."""

import subprocess
import sys
from pathlib import Path

import pytest

from src.config.validation import build_point
from src.planning.plan import make_plan
from src.planning.stage import Stage
from src.store.store import Store
from tests.support.artifacts import results
from tests.support.commands import ROOT, SMALL, environment, start, train
from tests.support.configs import composed
from tests.support.kills import kill_at

pytestmark = pytest.mark.slow

POINT = [*SMALL, "dataset.sft_size=960", "dataset.train_size=256", "trainer.align.epochs=2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(*POINT, f"output_dir={folder}")
    return results(folder)


def test_kill_9_in_every_stage_and_the_same_command_again_gives_identical_results(tmp_path, undisturbed):
    arguments = [*POINT, f"output_dir={tmp_path}"]
    checkpoint = ".work/*/checkpoints/*/step-*"
    moments = [
        (f"sft/{checkpoint}", 4),
        (f"sft/{checkpoint}", 12),
        ("reference/.work/*/attempt-*", 1),
        (f"align/{checkpoint}", 6),
        (f"align/{checkpoint}", 16),
        ("generate/.work/*/attempt-*", 1),
    ]
    for pattern, number in moments:
        kill_at(pattern, number, *arguments)
    train(*arguments)
    resumed = results(tmp_path)
    assert resumed.keys() == undisturbed.keys()
    assert [k for k in resumed if resumed[k] != undisturbed[k]] == []
    assert not list((tmp_path / "store").glob("*/.work/*")), "finished stages leave nothing behind"


def test_a_run_killed_while_sampling_resumes_with_the_remaining_prompts(tmp_path, undisturbed):
    arguments = [*POINT, f"output_dir={tmp_path}", "evaluation.generation.batch_size=2"]
    # The file is renamed into place while it is empty, then appended to.
    kill_at("generate/.work/*/checkpoints/responses.jsonl", 4, *arguments)
    (file,) = (tmp_path / "store").glob("generate/.work/*/checkpoints/responses.jsonl")
    known = file.read_text().count("\n")
    with file.open("a") as handle:
        handle.write('{"index": 1, "ids": [3, ')  # as a kill in the middle of a line leaves it
    train(*arguments, f"hydra.run.dir={tmp_path}/runs/again")
    log = (tmp_path / "runs" / "again" / "train.log").read_text()
    assert f"{known} of 16 responses were sampled before" in log and 0 < known < 16
    assert results(tmp_path) == undisturbed


# Compute the SFT stage in a child process that exits, as if killed, at its Nth file operation.
DIE_AT = """
import os, shutil, sys
sys.path.insert(0, {root!r})
import src.stages.sft
from src.stages.runner import compute_or_wait
from src.store.store import Store
from tests.test_resume import sft_stage

stage, store = sft_stage({folder!r}), Store({folder!r})
for fatal in {numbers!r}:
    child = os.fork()
    if child == 0:
        remaining = [fatal]
        def counting(function):
            def call(*arguments, **options):
                remaining[0] -= 1
                if remaining[0] == 0:
                    os._exit(9)
                return function(*arguments, **options)
            return call
        for module, name in ((os, "rename"), (os, "replace"), (os, "link"), (os, "fsync"), (os, "mkdir"),
                             (os, "unlink"), (os, "rmdir"), (shutil, "copy")):
            setattr(module, name, counting(getattr(module, name)))
        compute_or_wait(stage, store)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def sft_stage(folder: str) -> Stage:
    tiny = ["dataset.sft_size=128", "trainer.sft.batch_size=32", "trainer.checkpoint_minutes=0"]  # four steps
    point = build_point(composed(*tiny, f"output_dir={folder}"))
    return next(s for s in make_plan([point], Store(folder)).stages.values() if s.kind == "sft")


def sft_process(folder: Path, numbers: list[int]) -> list[int]:
    script = DIE_AT.format(root=str(ROOT), folder=str(folder), numbers=numbers)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_kill_at_any_single_file_operation_loses_nothing_and_publishes_nothing_partial(tmp_path):
    """Each child exits at a later operation than the one before and resumes from what that one wrote; the last one
    completes. The result is that of a run that was never killed."""
    calm = tmp_path / "calm"
    assert sft_process(calm, [10**9]) == [0]
    killed = tmp_path / "killed"
    # Spread so that the exits fall into lease, checkpoints and publication.
    exit_codes = sft_process(killed, [1, 2, 3, 6, 10, 14, 18, 22, 27, 32, 37, 42, 47, 52, 10**9])
    assert exit_codes.count(9) >= 10 and exit_codes[-1] == 0
    assert results(killed) == results(calm)


# Compute the SFT stage with checkpoints after steps 1 and 2, and die in the middle of writing the second one, when
# training has taken the third of its four steps.
DIE_WHILE_SAVING = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
import src.stages.sft
from src.stages.runner import compute_or_wait
from src.store.store import Store
from src.training.checkpoint_schedule import CheckpointSchedule
from tests.test_resume import sft_stage

ends_of_steps, writers, fsync = [], [], os.fsync
def is_due(schedule):
    ends_of_steps.append(None)
    return len(ends_of_steps) <= 2
def fsync_or_die(handle):
    thread = threading.current_thread()
    if thread.name == "checkpoint" and thread not in writers:
        writers.append(thread)
        if len(writers) == 2:
            while len(ends_of_steps) < 3:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
CheckpointSchedule.is_due, os.fsync = is_due, fsync_or_die
compute_or_wait(sft_stage({folder!r}), Store({folder!r}))
"""


def test_kill_9_in_the_middle_of_a_save_that_training_has_passed_and_the_same_again_is_identical(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert sft_process(calm, [10**9]) == [0]
    script = DIE_WHILE_SAVING.format(root=str(ROOT), folder=str(killed))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    (checkpoints,) = (killed / "store").glob("sft/.work/*/checkpoints/sharded")
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000001"]
    assert list(checkpoints.glob(".draft-*/__0_0.distcp")), "it was killed while it wrote"
    assert sft_process(killed, [10**9]) == [0]
    assert results(killed) == results(calm)


def test_two_processes_at_once_compute_each_stage_once(tmp_path, undisturbed):
    arguments = [*POINT, f"output_dir={tmp_path}"]
    both = [start(*arguments, f"hydra.run.dir={tmp_path}/runs/{n}") for n in range(2)]
    outputs = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    logs = [(tmp_path / "runs" / str(n) / "train.log").read_text() for n in range(2)]
    computed = [
        line.split(" INFO ")[1].split(": done in")[0]
        for log in logs
        for line in log.splitlines()
        if ": done in" in line
    ]
    assert len(computed) == len(set(computed)) == 6
    assert results(tmp_path) == undisturbed


def test_another_seed_gives_other_results(tmp_path, undisturbed):
    """The negative control of the comparisons above."""
    train(*POINT, f"output_dir={tmp_path}", "seed=1")
    metrics = [v for k, v in results(tmp_path).items() if k.endswith("metrics.jsonl")]
    assert all(m not in undisturbed.values() for m in metrics)
