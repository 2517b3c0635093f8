"""Compute the results of a study again from the rows that they were made of: samples, verdicts, validation rows.

Verdicts themselves are taken as they are: who judged, and why, is in judgements.jsonl.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import DamagedFile
from src.stages.averages import by_prompt, mean_and_error
from src.stages.measurements import MeasuredRows, capability_scores, measure, of_splits
from src.store.files import find, read_json, read_jsonl, with_checksum, write_json
from src.store.integrity import DONE, STAGE_FILE, describe_files, find_damage
from src.store.store import (
    CAPABILITY_FILE,
    FURTHER_JUDGE,
    JUDGEMENTS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    VALIDATION_FILE,
    VERDICTS_FILE,
    sample_key,
)
from sweeps.study.comparison import is_rounding


@dataclass(frozen=True)
class Moved:
    """A number of a result that is another one when it is computed again."""

    file: str
    place: str  # within the file
    old: Any
    new: Any


def recompute_results(root: Path) -> list[Moved]:
    """Replace every result below a store's root that its rows do not give, and return what moved.

    The results are readable by aggregation then, whatever was changed. Raises DamagedFile for rows that are missing or
    cannot be read.
    """
    return [moved for done in sorted(find(root, f"evaluate/*/{DONE}")) for moved in _recompute(root, done.parent)]


def _recompute(root: Path, folder: Path) -> list[Moved]:
    files = {name: read_json(folder / name) for name in (QUALITY_FILE, RESULT_FILE)}
    try:
        new = _results(root, folder, files[RESULT_FILE])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedFile):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise DamagedFile(f"{folder.relative_to(root)}: its rows are not those of its result ({reason})") from error
    if VERDICTS_FILE in new:
        files[VERDICTS_FILE] = read_json(folder / VERDICTS_FILE)
    name = f"store/{folder.relative_to(root).as_posix()}"
    moved = [one for file, content in new.items() for one in differences(f"{name}/{file}", files[file], content)]
    for file, content in new.items():
        if content != files[file]:
            write_json(folder / file, content)
    if find_damage(folder, folder.name) is not None:
        done = {key: value for key, value in read_json(folder / DONE).items() if key not in ("files", "checksum")}
        (folder / DONE).unlink()
        files_now = describe_files(folder)
        write_json(folder / DONE, with_checksum({**done, "identity": folder.name, "files": files_now}))
    return moved


def _results(root: Path, folder: Path, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return file -> its content, computed from the rows of the stage and its upstream."""
    description = read_json(folder / STAGE_FILE)
    inputs, upstream = description["inputs"], description["upstream"]
    samples = _rows(root / "generate" / upstream["samples"] / SAMPLES_FILE)
    pairs = _rows(root / "align" / upstream["align"] / VALIDATION_FILE)
    demonstrations = _rows(root / "sft" / upstream["sft"] / VALIDATION_FILE) if "sft" in upstream else []
    verdicts = _verdicts(folder, samples) if inputs["judge"] is not None else []
    rows = MeasuredRows(samples, pairs, demonstrations, verdicts)
    _, selection = rows.split(inputs["metric"], inputs["selection_fraction"], inputs["split_seed"])
    quality, measured = measure(rows, inputs["metric"], selection, inputs["prompts"].get("num_turns", 1))
    new = {QUALITY_FILE: quality, RESULT_FILE: {**result, **measured}}
    if (folder / CAPABILITY_FILE).exists():
        new[RESULT_FILE]["capability"] = capability_scores(read_json(folder / CAPABILITY_FILE)["tasks"])
    if (folder / VERDICTS_FILE).exists():
        all_verdicts = read_json(folder / VERDICTS_FILE)
        judges = {name: dict(one) for name, one in all_verdicts["judges"].items()}
        if verdicts:
            judges[inputs["judge"]["name"]]["value"] = [value for _, value in verdicts]
        further = {role: one for role, one in upstream.items() if role.startswith(FURTHER_JUDGE)}
        if further:
            new[RESULT_FILE]["judges"] = {name: dict(one) for name, one in result["judges"].items()}
        for role, stage in further.items():
            name = role.removeprefix(FURTHER_JUDGE)
            values = _verdicts(root / "judge" / stage, samples)
            judges[name]["value"] = [value for _, value in values]
            by_judge = {p: math.fsum(v) / len(v) for p, v in by_prompt((s["index"], v) for s, v in values).items()}
            new[RESULT_FILE]["judges"][name] |= {
                "quality": mean_and_error(list(by_judge.values())),
                "splits": of_splits(by_judge, set(all_verdicts["selection"])),
            }
        new[VERDICTS_FILE] = {**all_verdicts, "judges": judges}
    return new


def _verdicts(folder: Path, samples: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return the samples that were judged, with their verdicts."""
    by_key = {sample_key(sample): sample for sample in samples}
    return [(by_key[sample_key(row)], row["verdict"]) for row in _rows(folder / JUDGEMENTS_FILE)]


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_jsonl(path))
    except FileNotFoundError:
        raise DamagedFile(f"{path}: missing, and results were made of it") from None


def differences(file: str, old: Any, new: Any, place: str = "") -> list[Moved]:
    """Return where two JSON values differ by more than sums on another processor may be rounded otherwise."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys((*old, *new)))
        return [m for k in keys for m in differences(file, old.get(k), new.get(k), f"{place}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [m for i, (a, b) in pairs for m in differences(file, a, b, f"{place}[{i}]")]
    is_rounded = isinstance(old, float) and isinstance(new, float) and is_rounding(old, new)
    return [] if old == new or is_rounded else [Moved(file, place, old, new)]
