"""How long before its time limit a job is told to stop: at least what a save takes, measured or estimated."""

import json
from types import SimpleNamespace

import pytest

from launchers.slurm import cluster, submit
from launchers.slurm.job_records import new_submission
from launchers.slurm.time_limit import after_timeouts, signal_delay
from src import preemption
from src.errors import ConfigError
from src.planning.identity import VERSIONS
from src.planning.save_time import SaveTimes, seconds_to_stop
from src.store.files import with_checksum, write_json
from src.store.integrity import describe_files
from src.store.store import CHECKPOINT_FILE, CHECKPOINTS, Store
from src.store.sweep_folder import SweepFolder
from tests.support.configs import TINY, stage_of
from tests.support.slurm_options import slurm_options

POINT = [*TINY, "method=dpo", "beta=0.1"]


def finish(store, stage, **done):
    """Publish a stage without artifacts."""
    folder = store.dir(stage)
    folder.mkdir(parents=True)
    write_json(folder / "stage.json", stage.description)
    content = {"identity": stage.identity, "seconds": 1.0, "tokens": 1, "processes": 1, **done}
    write_json(folder / "DONE", with_checksum({**content, "files": describe_files(folder)}))


def leave_checkpoint(store, stage, **state):
    """Write the record of a checkpoint that an unfinished attempt has left."""
    folder = CHECKPOINTS.path(store.work(stage) / "checkpoints" / "zero3x8", 7)
    folder.mkdir(parents=True)
    write_json(folder / CHECKPOINT_FILE, with_checksum({"step": 7, **state}))


def test_what_a_save_takes_is_measured_by_the_stage_else_by_others_of_its_model_else_estimated(tmp_path):
    store, stage, other = Store(tmp_path), stage_of("align", *POINT), stage_of("align", *POINT, "seed=1")
    estimate = SaveTimes(store).seconds(stage)
    assert 0 < estimate <= 1, "12 bytes of a few hundred thousand parameters"
    finish(store, other, save_seconds=200.0)
    assert SaveTimes(store).seconds(stage) == 200.0
    leave_checkpoint(store, stage, save_seconds=300.0)
    assert SaveTimes(store).seconds(stage) == 300.0
    # The controls: another model, and a stage that trains nothing.
    assert SaveTimes(store).seconds(stage_of("align", *POINT, "model.lora.rank=4")) == 0
    assert SaveTimes(store).seconds(stage_of("generate", *POINT)) == 0
    assert VERSIONS["align"] == stage.description["version"]


def test_an_8b_model_gets_a_longer_signal_delay_than_the_default_before_anything_is_measured(tmp_path):
    stage = stage_of("align", "setup=llama31_8b_uf", "method=dpo", "beta=0.1")
    times = SaveTimes(Store(tmp_path))
    assert times.seconds(stage) == pytest.approx(12 * 8.03e9 / 0.5e9, rel=0.01)
    assert signal_delay("align", [stage], slurm_options(), times) > 1.5 * times.seconds(stage) > 120


def test_the_signal_comes_at_least_as_early_as_the_measured_save_takes(tmp_path):
    store, stage = Store(tmp_path), stage_of("align", *POINT)
    delay = lambda **values: signal_delay("align", [stage], slurm_options(**values), SaveTimes(store))  # noqa: E731
    assert delay() == 120 and delay(signal_delay_s=900) == 900  # the control: what is configured
    leave_checkpoint(store, stage, save_seconds=400.0)
    assert delay() == seconds_to_stop(400.0) == 630
    assert delay(signal_delay_s=900) == 900
    with pytest.raises(
        ConfigError, match=r"timeout_min=11 is too short for align jobs: a checkpoint takes about 400 s"
    ):
        delay(timeout_min=11)


def test_points_that_one_job_computes_at_once_have_time_to_save_at_once(tmp_path):
    store, stage = Store(tmp_path), stage_of("align", *POINT)
    leave_checkpoint(store, stage, save_seconds=100.0)
    delay = lambda **values: signal_delay("align", [stage], slurm_options(**values), SaveTimes(store))  # noqa: E731
    assert delay(gpus_per_node=4, points_per_job=8) == seconds_to_stop(400.0)
    assert delay(gpus_per_node=4) == seconds_to_stop(100.0)  # the control


@pytest.fixture
def submissions(monkeypatch, tmp_path):
    """Record what submitit is asked for; every job is job 7."""
    requests = []

    class Executor:
        def __init__(self, folder):
            pass

        def update_parameters(self, **parameters):
            requests.append(parameters)

        def map_array(self, function, *arguments):
            return [SimpleNamespace(job_id=f"7_{i}") for i in range(len(arguments[0]))]

    monkeypatch.setattr(submit.submitit, "SlurmExecutor", Executor)
    return requests


def test_sbatch_is_asked_for_that_signal_and_for_twice_as_much_after_a_timeout(submissions, tmp_path):
    folder, stage = SweepFolder(tmp_path / "sweeps" / "s"), stage_of("align", *POINT)
    tasks = [("a point", [["align", stage.identity]])]
    first = new_submission(folder, "align", tasks, signal_delay_s=300)
    submit._sbatch(first, slurm_options(), print, [((stage,),)], conditions={})
    assert [request["signal_delay_s"] for request in submissions] == [300]
    (task,) = first.tasks

    def delay(queued=(), identities=(stage.identity,), timeout_min=60):
        return after_timeouts(120, identities, [first], queued, timeout_min)

    task.write_status({"state": "running"})  # as a job that hits its limit in the middle of a save leaves it
    assert delay() == 600
    assert delay(timeout_min=15) == 450, "half of the time is for work"
    # The controls: it runs, it computes something else, or it ended with a word.
    assert delay(queued={"7_0"}) == delay(identities=("x",)) == 120
    for state in ("done", "failed", "stopped", "requeued"):
        task.write_status({"state": state})
        assert delay() == 120, state


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    yield now
    preemption.set_time_limit(None)
    preemption.reserve(0.0)


def test_a_job_stops_by_itself_when_only_the_time_of_its_last_save_is_left(clock):
    preemption.set_time_limit(3600.0, "the time limit is near")
    preemption.reserve(seconds_to_stop(400.0))
    clock[0] += 3600 - 631
    assert preemption.stop_reason() is None
    clock[0] += 2
    assert preemption.stop_reason() == "the time limit is near"
    preemption.reserve(seconds_to_stop(10.0))  # the control
    assert preemption.stop_reason() is None
    preemption.set_time_limit(None)
    clock[0] += 10**6
    assert preemption.stop_reason() is None


def test_a_save_that_takes_longer_than_the_job_leaves_it_half_of_its_time(clock):
    preemption.set_time_limit(3600.0, "the time limit is near")
    preemption.reserve(seconds_to_stop(10**5))
    clock[0] += 1799
    assert preemption.stop_reason() is None
    clock[0] += 2
    assert preemption.stop_reason() is not None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04\n", 93784.0),
        ("2:03:04\n", 7384.0),
        ("59:58\n", 3598.0),
        ("0:07\n", 7.0),
        *[(text, None) for text in ("UNLIMITED\n", "INVALID\n", "NOT_SET\n", "", "-0:05\n")],
    ],
)
def test_the_time_left_is_read_as_squeue_writes_it(text, seconds, monkeypatch):
    asked = []
    monkeypatch.setattr(cluster, "_run", lambda command: asked.append(command) or SimpleNamespace(stdout=text))
    assert cluster.seconds_left("12_3") == seconds
    assert asked == [["squeue", "--noheader", "--jobs=12_3", "--format=%L"]]


def test_a_job_of_eight_gpus_asks_for_the_memory_of_its_node_and_others_for_the_sites_default():
    kinds = slurm_options("slurm_8gpu").kinds
    assert [kinds[kind].sbatch().get("mem") for kind in ("sft", "align")] == ["0", "0"]
    assert [kinds[kind].sbatch().get("mem") for kind in ("reference", "baseline", "aggregate")] == [None] * 3
    assert slurm_options(mem_gb=1.5).kinds["align"].sbatch()["mem"] == "1536M"


def test_the_record_of_a_submission_has_its_signal_delay(tmp_path):
    submission = new_submission(SweepFolder(tmp_path / "sweeps" / "s"), "sft", [("x", [])], signal_delay_s=77)
    submission.write()
    assert json.loads((submission.folder / "submission.json").read_text())["signal_delay_s"] == 77
