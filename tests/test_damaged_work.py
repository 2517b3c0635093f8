"""What an interrupted stage left behind may be damaged: the next attempt goes on from what is sound."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src import preemption
from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.stages.shared_rows import SharedRows
from src.store.files import with_checksum
from src.store.store import Store
from src.training.checkpoints import _newest_undamaged
from sweeps.search.successive_halving import with_stop
from tests.support.artifacts import results
from tests.support.configs import TINY, point

NEWEST, BEFORE = "step-00000006", "step-00000002"


def train_to(folder: Path, stop_fraction: float, *kinds: str) -> Plan:
    from src.model.loading import set_cpu_threads

    store, partial = Store(folder), with_stop(point(*TINY, "beta=0.1", f"output_dir={folder}"), stop_fraction)
    plan = make_plan([partial], store)
    set_cpu_threads(partial.engine.cpu_threads)
    for stage in plan.stages.values():
        if stage.kind in (kinds or ("sft", "reference", "align")):
            compute_or_wait(stage, store)
    return plan


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """Return an output_dir with checkpoints of steps 2 and 6 of 8."""
    folder = tmp_path_factory.mktemp("two_checkpoints")
    train_to(folder, 0.75)
    train_to(folder, 0.25)
    return folder


def checkpoints_in(output_dir: Path) -> Path:
    (folder,) = (output_dir / "store").glob("align/.work/*/checkpoints/sharded")
    return folder


def edited(**values: object) -> Callable[[Path], None]:
    """Return a damage: other values in trainer.json."""

    def damage(checkpoint: Path) -> None:
        file = checkpoint / "trainer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def written(content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / "trainer.json").write_bytes(content) and None


def into_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def copied_from_another_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name(BEFORE), checkpoint)


DAMAGES = {
    "files: null": edited(files=None),
    "files: a list": edited(files=["__0_0.distcp"]),
    "no files": edited(files={}),
    "another number of tokens": edited(tokens=1),
    "a text as step": edited(step="six"),
    "empty": written(b""),
    "a list": written(b"[]"),
    "binary": written(b"\xff\x00"),
    "a file in its place": into_a_file,
    "a part is missing": lambda checkpoint: (checkpoint / "__0_0.distcp").unlink(),
    "a copy of another": copied_from_another_step,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, two_checkpoints, tmp_path, caplog):
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoints_in(two_checkpoints), folder)
    (folder / "step-abc").mkdir()
    (folder / "step-7").mkdir()
    assert _newest_undamaged(folder, 8) == folder / NEWEST  # the control
    damage(folder / NEWEST)
    assert _newest_undamaged(folder, 8) == folder / BEFORE
    assert f"checkpoint {folder / NEWEST} is corrupted" in caplog.text
    assert not (folder / NEWEST).exists(), "another checkpoint of this step can be saved"


def test_a_run_that_goes_on_from_the_checkpoint_before_equals_an_undisturbed_one(two_checkpoints, tmp_path, caplog):
    caplog.set_level("INFO")
    undisturbed, damaged = tmp_path / "undisturbed", tmp_path / "damaged"
    for folder in (undisturbed, damaged):
        shutil.copytree(two_checkpoints, folder)
    into_a_file(checkpoints_in(damaged) / NEWEST)
    (checkpoints_in(damaged) / "step-abc").mkdir()
    train_to(damaged, 1.0)
    assert [m for m in caplog.messages if "resuming" in m] == ["resuming from step 2"]
    train_to(undisturbed, 1.0)
    assert results(damaged) == results(undisturbed)


EVERYTHING = ("sft", "reference", "align", "generate", "evaluate")


@pytest.fixture
def interrupted_sampling(tmp_path, monkeypatch):
    """A point whose sampling was interrupted after the first responses, and one that nothing has disturbed."""
    train_to(tmp_path, 1.0)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "store", undisturbed / "store")
    train_to(undisturbed, 1.0, *EVERYTHING)
    save = SharedRows.save

    def save_and_stop(self, rows):
        preemption.request("a test")
        save(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SharedRows, "save", save_and_stop)
        with pytest.raises(preemption.Interrupted):
            train_to(tmp_path, 1.0, *EVERYTHING)
    preemption.request(None)
    return tmp_path, undisturbed


def test_damaged_responses_are_sampled_again_and_never_published(interrupted_sampling, caplog):
    """One of the responses is edited, and rows that are none are added."""
    disturbed, undisturbed = interrupted_sampling
    (file,) = (disturbed / "store").glob("generate/.work/*/checkpoints/responses.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = rows[0] | {"ids": [rows[0]["ids"][0] ^ 1, *rows[0]["ids"][1:]]}
    others = [{}, {"index": 999_999, "ids": [1], "finished": True, "seconds": 1.0}, {"index": "a", "ids": None}, [], 5]
    lines = [json.dumps(row) for row in (first, *rows[1:], *others)]
    file.write_text("\n".join([*lines, '{"index": 1, "ids": [3, ']))
    train_to(disturbed, 1.0, *EVERYTHING)
    assert f"{file}: 7 damaged lines; those rows are computed again" in caplog.text
    assert results(disturbed) == results(undisturbed)


@pytest.mark.parametrize("has_changed", [True, False])
def test_responses_of_a_model_with_other_bits_are_not_resumed_from(has_changed, interrupted_sampling, caplog, capfd):
    disturbed, undisturbed = interrupted_sampling
    if has_changed:  # as a GPU may compute it again
        for file in (disturbed / "store").glob("generate/.work/*/upstream.json"):
            upstream = json.loads(file.read_text())["upstream"]
            upstream["checkpoint"]["model.safetensors"] = "another"
            file.write_text(json.dumps(with_checksum({"upstream": upstream})))
    caplog.set_level("INFO")
    train_to(disturbed, 1.0, *EVERYTHING)
    assert ("starts anew: what it reads has been computed again" in capfd.readouterr().err) == has_changed
    assert ("responses were sampled before" in caplog.text) != has_changed
    assert results(disturbed) == results(undisturbed)


def test_a_clock_that_jumps_changes_no_duration(tmp_path, monkeypatch):
    jumps = iter(range(0, 10**12, 40_000_000))  # more than a year each, forward at first
    monkeypatch.setattr("time.time", lambda: float(next(jumps)) * (-1) ** (next(jumps) % 3))
    train_to(tmp_path, 1.0)
    seconds = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "store").glob("*/*/DONE")]
    assert len(seconds) == 3 and all(0 <= value < 600 for value in seconds)
