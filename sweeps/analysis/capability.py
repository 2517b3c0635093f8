"""What alignment has changed in capability: the scores of the selected points beside the SFT model's, by task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.errors import DamagedFile, warn
from src.store.files import read_versioned_json
from src.store.store import CAPABILITY_FILE, RESULT_SCHEMA
from sweeps.analysis.selection import STUDY
from sweeps.analysis.significance import bootstrap_means, compare, interval

if TYPE_CHECKING:
    from sweeps.analysis.results import Results

ALL_TASKS = "mean of the tasks"


def capability_changes(best: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Compare the selected points with their SFT model: a row for each task and one for the mean of several; else none.

    `difference` is paired by document, with its 95 % bootstrap interval over documents and p of the two-sided paired
    t-test; of the mean, documents are drawn within each task and p is that of a z-test. Seeds are averaged first, each
    with its own SFT model. best: of select_points.
    """
    rows = []
    for row in best.to_dict("records"):
        point = {name: row[name] for name in (*STUDY, "beta", "lr")}
        tasks = _tasks([tasks for result in row["identities"] if (tasks := _read(results, result))])
        differences, drawn = [], []
        for seed, (name, values) in enumerate(tasks.items()):
            means = bootstrap_means(values, seed)
            score, sft = values.mean(axis=1)
            counts = {"task": name, "documents": values.shape[1], "score": score, "sft": sft}
            rows.append(point | counts | compare(values, means, 0, 1))
            differences.append(values[0] - values[1])
            drawn.append(means)
        if len(tasks) > 1:
            low, high = interval(np.mean([means[:, 0] - means[:, 1] for means in drawn], axis=0))
            score, sft = np.mean([values.mean(axis=1) for values in tasks.values()], axis=0)
            counts = {"task": ALL_TASKS, "documents": sum(map(len, differences)), "score": score, "sft": sft}
            rows.append(point | counts | {"difference": score - sft, "low": low, "high": high, "p": _p(differences)})
    return pd.DataFrame(rows)


def _read(results: Results, result: str) -> dict[str, dict[str, Any]]:
    """Return the tasks of a result as its capability.json has them; none where none was asked or it is damaged."""
    folder = results.artifacts(result, "evaluate")
    assert folder is not None
    try:
        return read_versioned_json(folder / CAPABILITY_FILE, RESULT_SCHEMA)["tasks"]
    except FileNotFoundError:
        return {}
    except DamagedFile as error:
        warn(f"{error}; the table of capability is without it")
        return {}


def _tasks(seeds: list[dict[str, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Return task -> (2, documents): scores of the point and of its SFT model, means of the seeds that were asked."""
    return {
        name: np.mean([[tasks[name]["values"], tasks[name]["sft"]] for tasks in seeds], axis=0)
        for name in (seeds[0] if seeds else {})
    }


def _p(differences: list[np.ndarray]) -> float:
    """Return p of the two-sided z-test that the mean over tasks of mean differences is 0."""
    from scipy.stats import norm

    mean = float(np.mean([task.mean() for task in differences]))
    error = math.hypot(*(task.std(ddof=1) / math.sqrt(len(task)) for task in differences)) / len(differences)
    return float(2 * norm.sf(abs(mean) / error)) if error > 0 else float(mean == 0)
