"""Run the selected points of a study again on this machine, and test whether their values lie in its intervals."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launchers.local import LocalLauncher
from src.config.schema import Point
from src.config.validation import build_point
from src.errors import ConfigError, one_line, warn
from src.planning.plan import Plan, make_plan
from src.preflight import check_input_files
from src.store.files import read_json
from src.store.store import RUN_CONFIG_FILE, Store
from src.store.sweep_folder import SweepFolder
from sweeps.analysis import reporting_split
from sweeps.analysis.results import collect
from sweeps.analysis.significance import Z95
from sweeps.report.table_files import markdown_text
from sweeps.search.search import Search
from sweeps.study.archive import UnpackedStudy

UNSET = {  # keys of the packed configs that say how and where the study ran, not what
    "dry_run": False,
    "best_from": None,
    "keep_checkpoints": "best",
    "sweep": {"search": "grid", "judge_only": False},
    "tracking": {"name": "none", "wandb": {"enabled": False}, "tensorboard": {"enabled": False}},
}


def rerun_best(study: UnpackedStudy, output_dir: Path, methods: Sequence[str] | None, path: Path) -> bool:
    """Run the selected points of some methods, by default of all, print a table, and return whether all are inside.

    The new results are a sweep in output_dir; where it has them already they are not computed again. path: of the
    study, for the record. Raises ConfigError when a point cannot be run here, SweepFailed when one has failed.
    """
    results = collect([study.folder])
    _, best = reporting_split.selected_points(results, results.sweeps[0]["select"])
    if methods is not None:
        if unknown := sorted(set(methods) - set(best.method)):
            raise ConfigError(f"--methods {unknown[0]}: the study has {', '.join(sorted(best.method.unique()))}")
        best = best[best.method.isin(methods)]
    identities = [identity for seeds in best.identities for identity in seeds]
    store = Store(output_dir)
    points = [_point(study.folder.store.root / "evaluate" / identity, store) for identity in identities]
    name = f"{study.folder.name}_again"
    for point in points:
        point.sweep.name = name
    check_input_files(points)
    plan = make_plan(points, store)
    _warn_of_other_inputs(plan, identities)
    arguments = ["--points", "best", *(["--methods", *methods] if methods else []), "--output-dir", str(output_dir)]
    command = shlex.join(["python", "-m", "sweeps.reproduce", str(path), *arguments])
    print(f"{len(points)} points to run again, {plan.num_points_to_compute} of them not done yet, in {output_dir}")
    Search(plan, store).run(LocalLauncher(), name, command)

    again = SweepFolder(store.sweeps / name)
    new = collect([again]).points.set_index("identity")
    # With judge.reporting=selected a point has another result once its reporting prompts are judged, as they are here.
    whole = {point["identity"]: point.get("reporting") for point in again.read()["points"]}
    here = [whole[result] if whole.get(result) in new.index else result for result in plan.results]
    rows, is_inside = compare_with_intervals(best, new, dict(zip(identities, here, strict=True)))
    print(markdown_text(["method", "beta", "lr", "measure", "study", "95 % interval", "here", "inside"], rows), end="")
    print(f"{sum(is_inside)} of {len(is_inside)} values inside the study's intervals")
    return all(is_inside)


def _point(folder: Path, store: Store) -> Point:
    """Return the point of a result, from its packed config, as it runs here."""
    config = folder / RUN_CONFIG_FILE
    try:
        content = read_json(config)
        packed = OmegaConf.merge(OmegaConf.structured(Point), content, UNSET, {"output_dir": str(store.output_dir)})
        return build_point(packed)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise ConfigError(
            f"{folder.name}: the study has no {RUN_CONFIG_FILE} of it, so it cannot be run again"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{folder.name}/{RUN_CONFIG_FILE}: not a config of this version ({one_line(error)})"
        ) from None


def _warn_of_other_inputs(plan: Plan, identities: Iterable[str]) -> None:
    others = [
        point.label for point, *pair in zip(plan.points, plan.results, identities, strict=True) if len(set(pair)) > 1
    ]
    if others:
        warn(
            f"{len(others)} of {len(plan.points)} points are not those of the study, {others[0]} among them: a model, "
            "data file or prompt has other content here, or a stage has another version"
        )


def compare_with_intervals(
    best: pd.DataFrame, new: pd.DataFrame, result_here: dict[str, str]
) -> tuple[list[list[str]], list[bool]]:
    """Return one row for each selected point and measure, and whether each new value is inside.

    new: points of the new sweep by identity. result_here: identity in the study -> here.
    """
    rows, is_inside = [], []
    for row in best.to_dict("records"):
        seeds = new.loc[[result_here[identity] for identity in row["identities"]]]
        kl, error = row["kl_sequence"], row["kl_sequence_se"]
        quality = row["quality_reporting"], row["quality_reporting_low"], row["quality_reporting_high"]
        measures: dict[str, tuple[tuple[float, float, float], Any]] = {
            f"{row['metric']}, reporting prompts": (quality, seeds.quality_reporting),
            "KL per sequence, nats": ((kl, kl - Z95 * error, kl + Z95 * error), seeds.kl_sequence),
        }
        for measure, ((old, low, high), values) in measures.items():
            if isnan(old):  # with judge.reporting=selected, before the selected points were judged on these prompts
                continue
            here = float(values.mean())
            is_inside.append(bool(low <= here <= high))
            point = [row["method"], f"{row['beta']:g}", f"{row['lr']:g}"]
            numbers = [f"{old:.4f}", f"[{low:.4f}, {high:.4f}]", f"{here:.4f}", "yes" if is_inside[-1] else "NO"]
            rows.append([*point, measure, *numbers])
    return rows, is_inside
