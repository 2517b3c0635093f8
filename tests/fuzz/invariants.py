"""What holds after every command: exit codes, messages, where it wrote, and what the artifacts are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from tests.fuzz.sandbox import CANARIES, TYPED_CANARY, Finished
from tests.support.artifacts import results

EXIT_CODES = (0, 1, 2, 130)
ERROR_LINE = re.compile(r"^(error|failed): ")
# What may be on stderr besides: warnings, lines of a log, and how argparse answers to an option it does not have.
OTHER_LINE = re.compile(
    r"^\s*$|^(warning|note|usage|train\.py): |^\d{4}-\d\d-\d\d |^\[\d{4}-\d\d-\d\d |^\S*Warning: |^\S+: \w*Warning: "
    r"|^  |^Interrupted\."
)
EXCEPTION = re.compile(
    r"\b((Attribute|Assertion|Index|Key|Lookup|Name|OS|Overflow|Recursion|Type|Value|ZeroDivision|UnboundLocal"
    r"|Unicode\w*|JSONDecode|Runtime|Memory|EOF|FileNotFound|Permission|IsADirectory|NotADirectory)Error"
    r"|LexerNoViableAltException|Arrow\w+|SafetensorError)\b"
)


def check_command(done: Finished) -> list[str]:
    """Return which promises to a user the command broke."""
    broken: list[str] = []
    lines = re.split(r"[\n\r]+", done.stderr)
    errors = [line for line in lines if ERROR_LINE.match(line)]
    if done.code is None:
        broken.append(f"no end within {done.seconds:.0f} s")
    elif done.code not in EXIT_CODES:
        broken.append(f"exit code {done.code}")
    if "Traceback (most recent call last)" in done.stdout + done.stderr:
        last = [line for line in lines if line.strip()][-1:]
        broken.append(f"traceback: {' '.join(last)[:300]}")
    if len(errors) > 1:
        broken.append(f"{len(errors)} lines say what failed: {errors[-1][:300]}")
    if done.code == 0 and errors:
        broken.append(f"exit code 0 with {errors[0][:300]}")
    usage = any(line.startswith("usage: ") for line in lines)
    if done.code in (1, 2) and not errors and not usage:
        broken.append(f"exit code {done.code} without a line that says why: {done.stderr.strip()[-300:]}")
    if not usage and (others := [x for x in lines if not ERROR_LINE.match(x) and not OTHER_LINE.match(x)]):
        broken.append(f"stderr has other lines: {others[0][:300]!r}")
    if names := EXCEPTION.search("\n".join(errors)):
        broken.append(f"{names[0]} is no word for users: {errors[0][:300]}")
    if control := re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029]", "".join(errors)):
        broken.append(f"control character {control[0]!r} in the message")
    if any(len(line) > 2000 for line in errors):
        broken.append(f"a message of {max(map(len, errors))} characters")
    return broken


def check_secrets(done: Finished, root: Path) -> list[str]:
    """Return the outputs and files that contain a secret."""
    secrets = [value.encode() for value in (*CANARIES.values(), TYPED_CANARY)]
    contents = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    broken = [f"a secret in {name}" for name, text in contents.items() if any(s in text for s in secrets)]
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors" and any(s in path.read_bytes() for s in secrets):
            return [*broken, f"a secret in {path.relative_to(root)}"]
    return broken


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def check_written(before: set[Path], root: Path, allowed: Iterable[Path]) -> list[str]:
    """Return the new files that are in none of the allowed folders."""
    allowed = tuple(allowed)
    new = [p for p in sorted(files_below(root) - before) if not any(folder in p.parents for folder in allowed)]
    return [f"written outside output_dir: {new[0].relative_to(root)} and {len(new) - 1} more"] if new else []


def _without_deleted_stages(expected: object, artifacts: Mapping[str, object]) -> object:
    """Return a result whose account of stages lacks those that were deleted and that nothing computed again."""
    if not isinstance(expected, dict) or "stages" not in expected:
        return expected
    there = [stage for stage in expected["stages"] if f"{stage['stage']}/{stage['identity']}/DONE" in artifacts]
    return {**expected, "stages": there}


def check_artifacts(out: Path, undisturbed: Mapping[str, object], unread: Collection[str] = ()) -> list[str]:
    """Return the artifacts that differ from those of an undisturbed run. They may be absent.

    unread: damaged files that are as they were, because nothing has read them.
    """
    broken = []
    artifacts = results(out)
    for name, content in artifacts.items():
        expected = undisturbed.get(name)
        if name in undisturbed and content in (expected, _without_deleted_stages(expected, artifacts)):
            continue
        if name in unread:
            continue
        broken.append(f"{name} {'differs from an undisturbed run' if name in undisturbed else 'is no artifact'}")
    return broken
