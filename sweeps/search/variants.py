"""Settings that vary within a sweep beyond (setup, method, init, beta, lr, seed): `method.gamma_beta_ratio=0.3`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from src.config.fields import typed_leaves
from src.config.judge import JUDGES, Judge
from src.config.schema import Point, TensorboardTracking, WandbTracking
from src.errors import ConfigError

Study = tuple[str, str, str]  # setup, method, init

_COLUMNS = {"setup", "beta", "lr", "seed"}  # of points.csv, as method and init are
# Results do not depend on these keys and groups; engine.precision is the exception within its group.
_WITHOUT_EFFECT = {"sweep", "tracking", "output_dir", "keep_checkpoints", "dry_run", "best_from"}
_WITHOUT_EFFECT |= {"beta_grid", "lr_grid", "engine", "model.attention"}
_WITHOUT_EFFECT |= {"trainer.checkpoint_minutes", "trainer.max_tokens_per_micro_batch"}
_WITHOUT_EFFECT |= {"evaluation.generation.batch_size", "pairs.generation.batch_size"}
_WITHOUT_EFFECT |= {"capability.batch_size"}
_WITHOUT_EFFECT |= {"server.timeout", "server.concurrency", "server.is_automatic"}
_WITHOUT_EFFECT |= {"judges"}  # by which nothing is compared
_JUDGING = {"name", "baseline", "repeated_prompts", *(name for names in JUDGES.values() for name in names)}
_WITHOUT_EFFECT |= {f"judge.{f.name}" for f in fields(Judge) if f.name not in _JUDGING}
_SINKS = (("wandb", WandbTracking), ("tensorboard", TensorboardTracking))
# A sweep has one folder and one record, and runs or does not, so its points must agree in these.
_SWEEP_WIDE = (
    *("output_dir", "keep_checkpoints", "dry_run", "judge.reporting"),
    *(f"sweep.{name}" for name in ("name", "select", "search", "rungs", "keep_fraction")),
    *(f"tracking.{sink}.{f.name}" for sink, options in _SINKS for f in fields(options)),
)
# Keys without effect that other keys are computed from, and in which equal points may well differ.
_SOURCES = {"beta_grid", "lr_grid", "best_from"}


def check_sweep_wide_settings(points: list[Point]) -> None:
    """Raise ConfigError for a setting that must be equal for all points of a sweep but is not."""
    for key, values in _values_by_key(points).items():
        if (key in _SWEEP_WIDE or key.startswith("judges.")) and len(values) > 1:
            raise ConfigError(f"{key}: must be one value for a whole sweep, not {' and '.join(sorted(values)[:2])}")


def keys_without_effect(points: list[Point]) -> list[str]:
    """Return the keys that the points differ in although no result depends on them."""
    keys = [key for key, values in _values_by_key(points).items() if len(values) > 1]
    return [key for key in keys if _is_without_effect(key) and not {key, key.partition(".")[0]} & _SOURCES]


def _values_by_key(points: list[Point]) -> dict[str, set[str]]:
    values: dict[str, set[str]] = defaultdict(set)
    for point in points:
        for key, _, value in typed_leaves(point):
            values[key].add(str(value))
    return values


def varying_settings(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return for each point the settings in which it differs from others of its setup, method and init."""
    settings: dict[int, dict[str, Any]] = {}
    for group in _studies(points).values():
        tables = [_settings(point) for point in group]
        keys = _differing_keys(tables)
        settings |= {
            id(point): {key: table[key] for key in keys if key in table}
            for point, table in zip(group, tables, strict=True)
        }
    return [settings[id(point)] for point in points]


def variant_text(settings: Mapping[str, Any]) -> str:
    """Return settings as a name for display; sorted, so that equal variants have equal names."""
    return " ".join(sorted(f"{key}={value}" for key, value in settings.items()))


def name_variants(points: Sequence[Point]) -> None:
    """Set every point's sweep.variant to the settings in which it differs from others of its study."""
    for point, settings in zip(points, varying_settings(points), strict=True):
        point.sweep.variant = variant_text(settings)


def studies(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return setup, method, init and the settings that all their points share, for disambiguating_settings."""
    rows = []
    for (setup, method, init), group in _studies(points).items():
        tables = [_settings(point) for point in group]
        shared = dict(item for item in tables[0].items() if all(item in table.items() for table in tables))
        rows.append({"setup": setup, "method": method, "init": init, "settings": shared})
    return rows


def disambiguating_settings(sweeps: Sequence[Sequence[dict[str, Any]]]) -> list[dict[Study, dict[str, Any]]]:
    """Return for each sweep study -> the settings to add to its variant, given `studies` of every sweep.

    With them points of different sweeps are not mistaken for one study, and methods that were run differently are not
    compared. What a sweep varies itself is part of its variants already.
    """
    additions: list[dict[Study, dict[str, Any]]] = [{} for _ in sweeps]
    groups: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for index, sweep in enumerate(sweeps):
        for study in sweep:
            groups[study["setup"], study["init"]].append((index, study))
    for (setup, init), group in groups.items():
        common_keys = _differing_keys([_without_method(study["settings"]) for _, study in group])
        for index, study in group:
            same_method = [other["settings"] for _, other in group if other["method"] == study["method"]]
            method_keys = [key for key in _differing_keys(same_method) if key.startswith("method.")]
            keys = [key for key in (*common_keys, *method_keys) if key in study["settings"]]
            additions[index][setup, study["method"], init] = {key: study["settings"][key] for key in keys}
    return additions


def _without_method(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith("method.")}


def _studies(points: Sequence[Point]) -> dict[Study, list[Point]]:
    groups: dict[Study, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.setup.name, point.method.name, point.init.name].append(point)
    return groups


def _settings(point: Point) -> dict[str, Any]:
    return {
        key: value
        for key, _, value in typed_leaves(point)
        if key.partition(".")[0] not in _COLUMNS and not _is_without_effect(key)
    }


def _is_without_effect(key: str) -> bool:
    return key != "engine.precision" and bool({key, key.partition(".")[0]} & _WITHOUT_EFFECT)


def _differing_keys(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys in which the tables differ, or that some lack.

    Keys that the name of their group determines (model.name determines model.path) are left out.
    """
    texts = [{key: repr(value) for key, value in table.items()} for table in tables]
    keys = dict.fromkeys(key for table in tables for key in table)
    differing = [key for key in keys if len({text.get(key) for text in texts}) > 1]

    def is_implied(key: str) -> bool:
        name = f"{key.partition('.')[0]}.name"
        if name not in differing or key == name:
            return False
        pairs = {(text.get(name), text.get(key)) for text in texts}
        return len(pairs) == len({name_value for name_value, _ in pairs})

    return [key for key in differing if not is_implied(key)]
