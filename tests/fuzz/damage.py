"""Random damage to a finished store, to a sweep, and to the checkpoints of a run that stopped half-way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.invariants import check_artifacts, check_command, check_secrets, check_written, files_below
from tests.fuzz.overrides import SMALLEST
from tests.fuzz.sandbox import Finished, Sandbox
from tests.support.artifacts import results

RUN = ["tracking=none", "output_dir=out", *SMALLEST]
FOUR_STEPS = ["beta=0.1", "trainer.align.epochs=2", "trainer.align.max_steps=4"]
SWEEP = ["-m", "sweep.name=s", *RUN, "beta=0.1,0.3"]
# base -> the command that made it
BASES = {
    "finished": [*RUN, "beta=0.1"],
    "sweep": SWEEP,
    # A run that stops half-way leaves its checkpoints to the whole run.
    "half": [*RUN, *FOUR_STEPS, "trainer.align.stop_fraction=0.5"],
}
# What follows the damage: the same command, or one that shares some of the stages, or one that reads the sweep.
FOLLOW_UPS: dict[str, list[tuple[str, ...]]] = {
    "finished": [("src.train", *BASES["finished"]), ("src.train", *RUN, "beta=0.2")],
    "sweep": [
        *(("src.train", *SWEEP), ("src.train", *SWEEP), ("src.train", *RUN, "beta=0.2")),
        *(("sweeps.aggregate", "out/sweeps/s"), ("sweeps.status", "out/sweeps/s")),
    ],
    "half": [("src.train", *RUN, *FOUR_STEPS)],
}
TIMEOUT = 180  # seconds; a lease that names no process is waited for 60 s
SUMMARIES = ("points.csv", "best.yaml")  # what a sweep concludes


@dataclass(frozen=True)
class Change:
    """How one file is damaged. folder, file: positions in the sorted lists of those there are, in 1/1000."""

    action: str
    folder: int
    file: int
    position: int  # in the file, in 1/1000
    partner: int  # of a swap: position of the other file, in 1/1000


@dataclass(frozen=True)
class Damage:
    base: str
    follow_up: int
    changes: tuple[Change, ...]


JSON_VALUES = [b"null", b"[]", b"{}", b"5", b'"text"', b"[1]", b'{"schema": 99}', b'{"key": "x"}', b"NaN", b"[" * 5000]
STRAY_NAMES = [
    *("lease-abcdef", "step-abc", "step-99999999", "attempt-x", "DONE", ".work", "sweep.json", "x.jsonl", "a\nb", ".x"),
    *("step-000003", "submission.json", "WEIGHTS_REMOVED", "\U0001f98a", "model.safetensors.index.json"),
]


def _number(data: bytes) -> bytes:
    """Return the text with its last digit changed: still valid, but no longer what was computed."""
    for index in reversed(range(len(data))):
        if data[index : index + 1].isdigit():
            return data[:index] + (b"7" if data[index : index + 1] != b"7" else b"3") + data[index + 1 :]
    return data + b" "


EDITS = {
    "truncate": lambda data, at: data[:at],
    "flip": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] if data else b"x",
    "append": lambda data, at: data + data[:at][-40:],
    "empty": lambda data, at: b"",
    "garbage": lambda data, at: bytes((i * 97 + at) % 256 for i in range(200)),
    "not utf-8": lambda data, at: data[:at] + b"\xff\xfe" + data[at:],
    "json": lambda data, at: JSON_VALUES[at % len(JSON_VALUES)],
    "json line": lambda data, at: data + JSON_VALUES[at % len(JSON_VALUES)] + b"\n",
    "schema": lambda data, at: data.replace(b'"schema": 2', b'"schema": 99'),
    "number": lambda data, at: _number(data),
    "keys": lambda data, at: data.replace(b'"s', b'"z'),
    "lose a line": lambda data, at: data[: data.rfind(b"\n", 0, at) + 1] + data[data.find(b"\n", at) + 1 :],
    "zeros": lambda data, at: data[:at] + bytes(len(data) - at),
}
ACTIONS = [
    *EDITS,
    "flip",
    "truncate",
    "delete",
    "folder",
    "fifo",
    "dangling link",
    "link to itself",
    "swap",
    "stray file",
]
ACTIONS += ["stray folder", "delete folder", "folder is a file"]


@st.composite
def cases(draw: Any) -> Damage:
    base = draw(st.sampled_from(list(BASES)))
    position = st.integers(0, 999)
    change = st.builds(Change, st.sampled_from(ACTIONS), position, position, position, position)
    changes = draw(st.lists(change, min_size=1, max_size=draw(st.sampled_from([1, 1, 1, 3]))))
    return Damage(base, draw(st.integers(0, len(FOLLOW_UPS[base]) - 1)), tuple(changes))


@dataclass
class Bases:
    """Stores before the damage, and what the commands that follow make of them without any."""

    folders: dict[str, Path]
    undisturbed: dict[tuple[str, ...], dict[str, object]]  # follow-up -> artifacts
    summaries: dict[tuple[str, ...], dict[str, bytes]]  # follow-up -> file of the sweep -> content


def prepare(session: Path) -> Bases:
    """Compute the bases, and follow each undisturbed."""
    bases = Bases({}, {}, {})
    for name, arguments in BASES.items():
        sandbox = Sandbox(session / f"base-{name}")
        done = sandbox.run(*arguments, timeout=120)
        assert done.code == 0, done.stderr
        bases.folders[name] = sandbox.out
        for follow_up in dict.fromkeys(FOLLOW_UPS[name]):
            copy = Sandbox(session / f"undisturbed-{name}-{len(bases.undisturbed)}")
            shutil.copytree(sandbox.out, copy.out)
            done = copy.run(*follow_up[1:], module=follow_up[0], timeout=120)
            assert done.code == 0, (follow_up, done.stderr)
            bases.undisturbed[(name, *follow_up)] = results(copy.out)
            bases.summaries[(name, *follow_up)] = summaries(copy)
            shutil.rmtree(copy.root)
    return bases


def summaries(sandbox: Sandbox) -> dict[str, bytes]:
    """Return what the sweep concludes, apart from timings and from where it is."""
    contents = {}
    for name in SUMMARIES:
        path = sandbox.out / "sweeps" / "s" / name
        if path.is_file():
            text = path.read_bytes().replace(os.fsencode(sandbox.root), b"ROOT")
            if name == "points.csv":
                rows = [line.split(b",") for line in text.splitlines()]
                skipped = rows[0].index(b"seconds")
                text = b"\n".join(b",".join(row[:skipped] + row[skipped + 1 :]) for row in rows)
            contents[name] = text
    return contents


def state(path: Path) -> bytes:
    """Return what is at a path: the content of a file, and of anything else what it is."""
    if path.is_symlink():
        return b"link to " + os.fsencode(os.readlink(path))
    if path.is_file():
        return path.read_bytes()
    return b"folder" if path.is_dir() else b"something else" if path.exists() else b"nothing"


def apply(change: Change, out: Path) -> list[Path]:
    """Damage the store, and return the files that are no longer what they were."""
    folders = sorted({p.parent for p in out.rglob("*") if p.is_file() and "runs" not in p.relative_to(out).parts})
    if not folders:
        return []
    folder = folders[change.folder * len(folders) // 1000]
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if change.action.startswith("stray"):
        path = folder / STRAY_NAMES[change.position % len(STRAY_NAMES)]
        if not path.exists():
            path.mkdir() if change.action == "stray folder" else path.write_bytes(JSON_VALUES[change.file % 10])
        return [path]
    if change.action in ("delete folder", "folder is a file"):
        lost = [path for path in folder.rglob("*") if path.is_file()]
        shutil.rmtree(folder)
        if change.action == "folder is a file":
            folder.write_bytes(b"x")
        return [*lost, folder]
    path = files[change.file * len(files) // 1000]
    if change.action in EDITS:
        data = path.read_bytes()
        path.write_bytes(EDITS[change.action](data, min(change.position * len(data) // 1000, max(0, len(data) - 1))))
        return [path]
    if change.action == "swap":
        alike = sorted(p for p in out.rglob(f"*{path.suffix}") if p.is_file() and p.suffix == path.suffix)
        other = alike[change.partner * len(alike) // 1000]
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second), other.write_bytes(first)
        return [path, other]
    path.unlink()
    if change.action == "folder":
        path.mkdir()
    elif change.action == "fifo":
        os.mkfifo(path)
    elif change.action == "dangling link":
        path.symlink_to("nowhere")
    elif change.action == "link to itself":
        path.symlink_to(path.name)
    return [path]


def check(case: Damage, sandbox: Sandbox, bases: Bases) -> list[str]:
    """Damage a copy of the base, run the follow-up, and compare with the same without damage."""
    shutil.copytree(bases.folders[case.base], sandbox.out)
    damaged = [path for change in case.changes for path in apply(change, sandbox.out)]
    left_as_is = {path: state(path) for path in damaged}
    follow_up = FOLLOW_UPS[case.base][case.follow_up]
    before = files_below(sandbox.root)
    done = sandbox.run(*follow_up[1:], module=follow_up[0], timeout=TIMEOUT)
    outputs = {sandbox.root / "stdout", sandbox.root / "stderr"}
    # The table of sweeps.status says what failed, and its exit code that something did.
    tabled = (
        follow_up[0] == "sweeps.status" and done.code == 1 and re.search(r"^(failed|cancelled) ", done.stdout, re.M)
    )
    broken = [] if tabled else check_command(done)
    broken += check_secrets(done, sandbox.root)
    broken += check_written(before | outputs, sandbox.root, [sandbox.home, sandbox.tmp, sandbox.out])
    store = sandbox.out / "store"
    unread = {p.relative_to(store).as_posix(): s for p, s in left_as_is.items() if store in p.parents and state(p) == s}
    undisturbed = bases.undisturbed[(case.base, *follow_up)]
    # A folder that lost a file, or has one more, keeps its other files.
    broken += check_artifacts(sandbox.out, undisturbed, unread)
    if done.code in (1, 2) and not tabled:
        broken += _names_no_file(done)
    elif follow_up[0] != "sweeps.status" and not re.search(r"^(to do|failed): ", done.stdout, re.M):
        expected = bases.summaries[(case.base, *follow_up)]
        after = summaries(sandbox)
        stale = {sandbox.out / "sweeps" / "s" / name for name in SUMMARIES} & set(damaged)
        if "-m" in follow_up or follow_up[0] == "sweeps.aggregate":
            stale = set()  # both are written anew
        for name in expected:
            path = sandbox.out / "sweeps" / "s" / name
            if path not in stale and after.get(name) != expected[name] and "warning" not in done.stderr.lower():
                broken.append(f"sweeps/s/{name} differs from an undisturbed sweep's, without a warning")
    return broken


def _names_no_file(done: Finished) -> list[str]:
    message = done.stderr + "".join(line for line in done.stdout.splitlines() if line.startswith("failed"))
    return [] if "/" in message or "output_dir" in message else [f"names no file: {done.stderr.strip()[-300:]}"]


def smaller(case: Damage) -> Iterator[Damage]:
    """Yield the case with one change less."""
    for i in range(len(case.changes) if len(case.changes) > 1 else 0):
        yield replace(case, changes=case.changes[:i] + case.changes[i + 1 :])
