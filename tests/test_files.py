import errno
import json
import logging
import os
from pathlib import Path

import pytest

from src.errors import DamagedFile, report_errors
from src.store.files import file_digest, read_json, read_jsonl, write_jsonl

DAMAGE = {
    "empty": (b"", "line 1: damaged, not JSON"),
    "cut off": (b'{"a": 1}\n{"a":', "line 2: damaged, not JSON"),
    "a list": (b'{"a": 1}\n[1]', "line 2: damaged, a JSON object is expected, not list"),
    "binary": (b"\xff\xfe\x00", "line 1: damaged, not JSON"),
    "nested beyond the parser": (b'{"a":' + b"[" * 200_000, "line 1: damaged, not JSON"),
    "a number beyond the parser": (b'{"a": ' + b"1" * 5000 + b"}", "line 1: damaged, not JSON"),
    "a key missing": (b'{"b": 1}', "line 1: damaged, it has no a"),
}


@pytest.mark.parametrize("content, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_with_the_line(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DamagedFile) as error:
        list(read_jsonl(path, keys=("a",)))
    assert str(error.value).startswith(f"{path}, {message}")


def test_line_breaks_of_unicode_inside_a_text_do_not_end_its_row(tmp_path):
    rows = [{"a": "1\u2028\u2029\x85\x0b\x0c\r2"}, {"a": "\U0001f600"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == rows
    # Python's own idea of a line would tear the first row apart.
    with pytest.raises(json.JSONDecodeError):
        [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_folder_or_a_missing_file_in_place_of_a_file(tmp_path):
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(Path(tmp_path, "missing"))


def test_a_named_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "DONE")
    for read in (read_json, file_digest):
        with pytest.raises(DamagedFile, match="it is a named pipe"):
            read(tmp_path / "DONE")


def test_a_full_disk_under_the_log_as_well_is_one_line(capfd, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    handler = logging.FileHandler("/dev/full", delay=True)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with pytest.raises(SystemExit) as exit, report_errors():
        logging.warning("a line that the disk has no room for")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert exit.value.code == 1
    assert capfd.readouterr().err == "failed: No space left on device; free some space and run the same command again\n"


def test_a_named_pipe_has_no_digest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedFile, match="named pipe"):
        file_digest(tmp_path / "pipe")
