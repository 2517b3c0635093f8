"""Damaged records of one sweep's jobs do not stop another sweep; nor do those of another version."""

import json
import os

import pytest

from launchers.slurm.job_records import all_submissions, new_submission, read_submission
from src import errors
from src.errors import ConfigError, DamagedFile
from src.store.store import Store
from src.store.sweep_folder import SweepFolder


@pytest.fixture
def record(tmp_path):
    """Return the path of a record beside which another sweep has a sound one."""
    errors.warn.cache_clear()
    for sweep in ("damaged", "sound"):
        submission = new_submission(SweepFolder(tmp_path / "sweeps" / sweep), "sft", [(sweep, [["sft", "1"]])])
        submission.write()
    return next((tmp_path / "sweeps" / "damaged").glob("jobs/*/submission.json"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"schema": 2}', b'{"schema": 2, "tasks": [{"x": 1}]}', b"\xff"]
)
def test_a_damaged_record_is_left_out_with_a_warning(content, record, tmp_path, capsys):
    assert len(all_submissions(Store(tmp_path))) == 2  # the control
    record.write_bytes(content)
    with pytest.raises(DamagedFile, match="damaged"):
        read_submission(record.parent)
    (submission,) = all_submissions(Store(tmp_path))
    assert submission.tasks[0].label == "sound"
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {record}")


def test_a_record_of_another_version_is_left_out_by_name(record, tmp_path, capsys):
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 99}))
    with pytest.raises(ConfigError, match="schema 99, this one reads 2") as refused:
        read_submission(record.parent)
    assert str(refused.value).startswith(str(record))
    (submission,) = all_submissions(Store(tmp_path))
    assert submission.tasks[0].label == "sound"
    assert capsys.readouterr().err.startswith(f"warning: {record} was written by another version")


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff"])
def test_a_status_that_cannot_be_read_is_that_of_a_job_that_has_not_started(content, record):
    task = read_submission(record.parent).tasks[0]
    task.write_status({"state": "running"})
    assert task.status() == {"state": "running"}  # the control
    path = record.with_name("task-0.json")
    path.unlink() if content is None else path.write_bytes(content)
    assert task.status() == {}


def test_only_the_submitter_may_write_where_jobs_read_their_pickles(tmp_path):
    umask = os.umask(0o002)  # of a group folder
    try:
        submission = new_submission(SweepFolder(tmp_path / "sweeps" / "s"), "align", [])
        submission.write()
    finally:
        os.umask(umask)
    jobs = submission.folder.parent
    assert jobs.stat().st_mode & 0o777 == 0o700
    assert jobs.parent.stat().st_mode & 0o070 == 0o070, "the results beside them stay the group's"
