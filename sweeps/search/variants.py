"""What tells points apart besides setup, method, init, beta, lr and seed: `method.gamma_beta_ratio=0.3`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from src.config.judge_rules import JUDGES
from src.config.schema import Judge, Point, leaves

Study = tuple[str, str, str]  # setup, method, init

# Columns of their own, or nothing a result depends on.
_NOT_VARIANTS = {"beta", "lr", "seed", "sweep", "tracking", "output_dir", "keep_checkpoints", "dry_run", "best_from"}
_NOT_VARIANTS |= {"beta_grid", "lr_grid", "setup", "engine"}
_NOT_VARIANTS |= {"trainer.save_steps", "trainer.max_tokens_per_micro_batch", "evaluation.generation.batch_size"}
_NOT_VARIANTS |= {"server.timeout", "server.concurrency", "model.attention"}
_JUDGING = {"name", "baseline", *(name for names in JUDGES.values() for name in names)}
_NOT_VARIANTS |= {f"judge.{f.name}" for f in fields(Judge) if f.name not in _JUDGING}
# One folder, one record, one answer to "does it run": these cannot differ between the points of a sweep.
_ONE_FOR_ALL = (
    *("output_dir", "keep_checkpoints", "dry_run"),
    *(f"sweep.{name}" for name in ("name", "select", "search", "rungs", "keep_fraction")),
)


def varying_settings(points: list[Point]) -> list[str]:
    """Which settings of the sweep itself its points disagree in; there should be none."""
    tables = [dict(leaves(point)) for point in points]
    return [key for key in _ONE_FOR_ALL if len({repr(table[key]) for table in tables}) > 1]


def name_variants(points: list[Point]) -> None:
    """Set every point's sweep.variant to the values in which it differs from others of its setup, method and init."""
    for group in _studies(points).values():
        tables = [_settings(point) for point in group]
        shown = _shown(tables)
        for point, table in zip(group, tables, strict=True):
            point.sweep.variant = " ".join(sorted(f"{key}={table[key]}" for key in shown))  # equal ones read the same


def studies(points: list[Point]) -> list[dict[str, Any]]:
    """Of every setup, method and init of a sweep: the settings that all its points share, for telling_apart."""
    found = []
    for (setup, method, init), group in _studies(points).items():
        tables = [_settings(point) for point in group]
        shared = {key: value for key, value in tables[0].items() if all(table[key] == value for table in tables)}
        found.append({"setup": setup, "method": method, "init": init, "settings": shared})
    return found


def telling_apart(sweeps: Sequence[Sequence[dict[str, Any]]]) -> list[dict[Study, str]]:
    """For each sweep, given `studies` of all: setup, method, init -> what its variant must say besides, so that points
    of different sweeps are not taken for the same study, nor methods compared that were run otherwise. What a sweep
    itself varies is in its variants already."""
    found: list[dict[Study, str]] = [{} for _ in sweeps]
    groups: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for number, sweep in enumerate(sweeps):
        for study in sweep:
            groups[study["setup"], study["init"]].append((number, study))
    for (setup, init), group in groups.items():
        common = _shown([_others(study["settings"]) for _, study in group])
        for number, study in group:
            same = [other["settings"] for _, other in group if other["method"] == study["method"]]
            own = [key for key in _shown(same) if key.startswith("method.")]
            said = [f"{key}={study['settings'][key]}" for key in (*common, *own) if key in study["settings"]]
            found[number][setup, study["method"], init] = " ".join(said)
    return found


def _others(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that do not belong to a method."""
    return {key: value for key, value in settings.items() if not key.startswith("method.")}


def _studies(points: list[Point]) -> dict[Study, list[Point]]:
    groups: dict[Study, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.setup.name, point.method.name, point.init.name].append(point)
    return groups


def _settings(point: Point) -> dict[str, Any]:
    return {
        key: value
        for key, value in leaves(point)
        if key == "engine.precision" or not {key, key.partition(".")[0]} & _NOT_VARIANTS
    }


def _shown(tables: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which tables differ, or that some have not. Where the choice of a group says it all (model.name
    stands for model.path and the rest), that alone."""
    keys = dict.fromkeys(key for table in tables for key in table)
    differing = [key for key in keys if len({_value(table, key) for table in tables}) > 1]

    def implied(key: str) -> bool:
        name = f"{key.partition('.')[0]}.name"
        if name not in differing or key == name:
            return False
        pairs = {(_value(table, name), _value(table, key)) for table in tables}
        return len(pairs) == len({of for of, _ in pairs})

    return [key for key in differing if not implied(key)]


def _value(table: dict[str, Any], key: str) -> str | None:
    return repr(table[key]) if key in table else None
