"""The models of a sweep that are published: the selected point of every method, with what its card says of it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src.config.hydra_setup import value_text
from src.config.secrets import check_secret
from src.errors import ConfigError, DamagedFile
from src.methods import METHODS
from src.store.files import find, read_json
from src.store.integrity import WEIGHTS, find_damage
from src.store.store import RUN_CONFIG_FILE
from src.store.sweep_folder import SweepFolder
from sweeps.analysis import reporting_split
from sweeps.analysis.results import Results
from sweeps.analysis.selection import best_lr_per_beta, rows_of_study
from sweeps.recorded_command import arguments_of, key_of, variant_overrides, without
from sweeps.report.tables import gap_to_best

# Overrides that the command which remakes a model does not take from that of the sweep: it has others of its own, or
# needs none, because its samples are not judged.
_ALWAYS_NEW = ("output_dir", "keep_checkpoints", "dry_run", "evaluation.generation.seed", "evaluation.metric")
_NOT_NEEDED = ("sweep.", "judge", "capability")


@dataclass(frozen=True)
class ChosenModel:
    """A selected point; of several seeds the weights are those of the first."""

    name: str  # of its folder, and the end of its repository's
    row: Mapping[Any, Any]  # of with_intervals
    gap: str  # to the best method, as in the table of the selected points
    curve: pd.DataFrame  # of its study, one row a beta, each at its best lr
    grid: pd.DataFrame  # the points of its study, done or not
    num_prompts: int  # of the reporting split
    config: Mapping[str, Any]  # resolved, of the run that evaluated it
    checkpoint: Path  # artifacts of its alignment
    sft: Path | None  # those of the SFT model that it started from

    @property
    def method(self) -> str:
        return str(self.row["method"])

    @property
    def is_adapter(self) -> bool:
        return (self.checkpoint / "adapter_config.json").exists()


@dataclass(frozen=True)
class PublishedSweep:
    """A sweep with its results, and the models that are published of it."""

    folder: SweepFolder
    record: Mapping[str, Any]  # sweep.json
    results: Results
    best: pd.DataFrame  # of with_intervals
    differences: pd.DataFrame  # of reporting_split.differences
    models: list[ChosenModel]

    @property
    def num_done(self) -> int:
        return int((self.results.points.state == "done").sum())

    @property
    def checkpoints(self) -> list[Path]:
        """The artifacts of alignment of all finished points, with or without weights."""
        return [Path(path) for path in self.results.points.checkpoint[self.results.points.state == "done"]]


def choose(folder: SweepFolder, results: Results, methods: Collection[str] | None) -> PublishedSweep:
    """Return the study with the best point of each of the methods, None for all, in every setup.

    As in best.yaml a method has one model in a setup: of several inits and variants the one that is best on the
    selection split. Raises ConfigError when nothing is selected, a method has no result, or a model is not there.
    """
    record = results.sweeps[0]
    check_secret(f"command of {folder.record}", record["command"])
    averages, best = reporting_split.selected_points(results, record["select"])
    if best.empty:
        raise ConfigError(f"{folder.path}: no point has a result yet; publish it when the sweep has finished")
    differences = reporting_split.differences(best, results.prompts)
    rows = best.assign(gap=gap_to_best(best, differences)).sort_values(
        "quality_selection", ascending=False, kind="stable"
    )
    rows = rows.drop_duplicates(["setup", "method"])
    order = {method: number for number, method in enumerate(METHODS)}
    rows = rows.sort_values(["setup", "method"], key=lambda names: names.map(order).fillna(names), kind="stable")
    if methods is not None:
        if unknown := sorted(set(methods) - set(rows.method)):
            have = ", ".join(dict.fromkeys(rows.method))
            raise ConfigError(f"--methods {unknown[0]}: {folder.path} has no result of it, but of {have}")
        rows = rows[rows.method.isin(list(methods))]
    curves = best_lr_per_beta(averages)
    models = [_chosen(folder, results, row, curves, rows.setup.nunique() > 1) for row in rows.to_dict("records")]
    return PublishedSweep(folder, record, results, best, differences, models)


def _chosen(
    folder: SweepFolder, results: Results, row: Mapping[Any, Any], curves: pd.DataFrame, with_setup: bool
) -> ChosenModel:
    result = row["identities"][0]
    evaluation, checkpoint = (results.artifacts(result, role) for role in ("evaluate", "align"))
    assert evaluation is not None and checkpoint is not None
    _check_model(folder, results, row, checkpoint)
    try:
        config = read_json(evaluation / RUN_CONFIG_FILE)
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename}: missing; run the sweep again") from None
    curve, grid = (rows_of_study(table, row) for table in (curves, results.points))
    prompts = results.prompts.reporting([[result]]).shape[1]
    name = f"{row['setup']}-{row['method']}" if with_setup else row["method"]
    sft = results.artifacts(result, "sft") if row["init"] == "sft" else None
    return ChosenModel(name, row, row["gap"], curve, grid, prompts, config, checkpoint, sft)


def _check_model(folder: SweepFolder, results: Results, row: Mapping[Any, Any], checkpoint: Path) -> None:
    """Raise ConfigError, with the command that remakes it, when the model is not on disk or damaged."""
    damage = find_damage(checkpoint, checkpoint.name)
    if damage is None and not find(checkpoint, WEIGHTS):
        damage = "keep_checkpoints has removed its weights" if checkpoint.is_dir() else f"{checkpoint}: no such folder"
    if damage is not None:
        command = remaking_command(folder, results, row)
        again = "" if command is None else f"; this command trains it again: {shlex.join(command)}"
        raise ConfigError(
            f"the model of {row['method']} (beta={row['beta']:g} lr={row['lr']:g} seed={row['seed']}) cannot be "
            f"published: {damage}{again} (or leave it out: --methods, --no-models)"
        )


def remaking_command(folder: SweepFolder, results: Results, row: Mapping[Any, Any]) -> list[str] | None:
    """Return the command that trains the model of a selected point again, under the identity that it had.

    Samples with another seed, which must be drawn from the model, make sure that it is needed; they are not judged.
    None for a sweep that src.train did not make, such as one of sweeps.reproduce.
    """
    if (arguments := arguments_of(results.sweeps[0]["command"])) is None:
        return None
    settings = variant_overrides(results.settings.get(row["identities"][0], {}))
    point = {"method": row["method"], "init": row["init"], "beta": row["beta"], "lr": row["lr"], "seed": row["seed"]}
    if results.points.setup.nunique() > 1:
        point["setup"] = row["setup"]
    point |= {key: value for key, value in settings.items() if not key.startswith(_NOT_NEEDED)}
    recorded = without(arguments, {*point, *_ALWAYS_NEW})
    kept = [word for word in recorded if not word.startswith("-") and not key_of(word).startswith(_NOT_NEEDED)]
    store = results.stores[0]
    new = [
        f"output_dir={value_text(str(store.parent))}",
        f"sweep.name={folder.name}_{row['method']}",
        "keep_checkpoints=all",
    ]
    new += ["evaluation.generation.seed=1000003", "judge=none", "evaluation.metric=reward_accuracy", "capability=none"]
    return ["python", "-m", "src.train", "-m", *kept, *(f"{key}={value}" for key, value in point.items()), *new]
