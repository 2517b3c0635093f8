"""Apply the rules about the methods that are compared with each other, and about runs that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from src.errors import DamagedFile
from src.methods import METHODS
from src.store.files import read_json
from src.store.store import RUN_CONFIG_FILE
from sweeps.analysis.diagnosis.displacement import not_measured
from sweeps.analysis.diagnosis.finding import Finding, that_fired
from sweeps.analysis.diagnosis.noise import Pair, one_seed, seed_noise, too_few_prompts
from sweeps.analysis.diagnosis.point_files import NO_REFERENCE, PointFiles
from sweeps.analysis.diagnosis.training import diverged
from sweeps.analysis.selection import STUDY

if TYPE_CHECKING:
    from sweeps.analysis.results import Results

INTERVAL = ("difference", "low", "high", "p_holm")


def of_group(results: Results, group: pd.DataFrame, differences: pd.DataFrame) -> list[Finding]:
    """Return the findings about the selected points of a setup, init and variant.

    differences: those of reporting_split.differences between them.
    """
    if len(group) < 2:
        return []
    findings = [one_seed(len(group))] if (group.seeds == 1).all() else []
    quality = results.points.set_index("identity").quality_reporting
    identities: dict[str, list[str]] = dict(zip(group.method, group.identities, strict=True))
    for pair in differences.to_dict("records"):
        names = METHODS[pair["method"]].name, METHODS[pair["other"]].name
        seeds = tuple(quality.reindex(identities[str(pair[name])]).to_numpy(float) for name in ("method", "other"))
        findings += that_fired(seed_noise(names, (seeds[0], seeds[1]), pair["p_holm"]))
    return findings + that_fired(_tied(results, group, differences))


def _tied(results: Results, group: pd.DataFrame, differences: pd.DataFrame) -> Finding | None:
    """Return what the reporting prompts do not tell: which methods differ from the best one within noise."""
    if differences.empty:
        return None
    top = group.sort_values("quality_reporting", kind="stable", ascending=False).to_dict("records")[0]
    pairs = differences[(differences.method == top["method"]) | (differences.other == top["method"])]
    others = [
        Pair(METHODS[row["other" if row["method"] == top["method"] else "method"]].name, *(row[c] for c in INTERVAL))
        for row in pairs.to_dict("records")
    ]
    counts = [split([top["identities"]]).shape[1] for split in (results.prompts.reporting, results.prompts.selection)]
    setting = _prompts_setting(results, top, sum(counts))
    return too_few_prompts(
        METHODS[top["method"]].name, others, len(differences), counts[0], setting, counts[0] / sum(counts)
    )


def _prompts_setting(results: Results, point: dict[Any, Any], count: int) -> str | None:
    """Return the config key that gives a point more prompts than `count`; None where no more are known of."""
    folder = results.artifacts(point["identities"][0], "evaluate")
    assert folder is not None
    try:
        config = read_json(folder / RUN_CONFIG_FILE)
    except (OSError, DamagedFile):
        return None
    if point["metric"] == "reward_accuracy":
        key, asked, is_file = "dataset.validation_size", config["dataset"]["validation_size"], False
    else:
        evaluation = config["evaluation"]
        key, asked, is_file = (
            "evaluation.num_prompts",
            evaluation["num_prompts"],
            evaluation["prompts_file"] is not None,
        )
    return key if asked == count and not is_file else None


def unmeasured(files: PointFiles, group: pd.DataFrame) -> list[Finding]:
    """Return a finding for every reason why displacement is unknown for some of the selected points."""
    reasons: dict[str, list[str]] = {}
    for row in group.to_dict("records"):
        if files.chosen_logps(row["identities"]) is None and (why := files.why_unknown(row["identities"][0])):
            reasons.setdefault(why, []).append(METHODS[row["method"]].name)
    return [not_measured(methods, why, why == NO_REFERENCE) for why, methods in reasons.items()]


def of_failures(results: Results) -> list[tuple[Finding, dict[Any, Any]]]:
    """Return what is found of runs that failed, each with a row of the points of its study."""
    points, findings = results.points, []
    for _, study in points.groupby(STUDY, sort=False, dropna=False):
        failed = study[study.error.notna()]
        errors = [(row["beta"], row["lr"], str(row["error"])) for row in failed.to_dict("records")]
        if (finding := diverged(errors, len(study))) is not None:
            findings.append((finding, failed.iloc[0].to_dict()))
    return findings
