"""Apply the rules about the points of a method: every beta at its best lr, and every lr at the best beta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from src.methods import METHODS
from sweeps.analysis.diagnosis.displacement import displacement
from sweeps.analysis.diagnosis.finding import SEVERITIES, Finding, is_above, rounded, that_fired, values_text
from sweeps.analysis.diagnosis.length import length_explains
from sweeps.analysis.diagnosis.samples import beyond_sft, repetition, unfinished
from sweeps.analysis.diagnosis.training import DistanceMoved, loss_above_start, loss_at_start
from sweeps.analysis.diagnosis.tuning import GridPoint, border, over_optimized
from sweeps.analysis.selection import best_lr_per_beta

if TYPE_CHECKING:
    from sweeps.analysis.diagnosis.point_files import PointFiles
    from sweeps.analysis.results import Results

Row = dict[Any, Any]  # of average_seeds


class Found(NamedTuple):
    """A finding about a point of a study, or about the study, whose point then is the selected one."""

    finding: Finding
    point: Row
    is_selected: bool


def of_study(
    results: Results, files: PointFiles, study: pd.DataFrame, best: Row, verdicts: pd.DataFrame
) -> list[Found]:
    """Return the findings of a study. study: its rows of average_seeds. best: the selected one of them."""
    best_lrs = best_lr_per_beta(study)
    examined = pd.concat([best_lrs, study[study.beta == best["beta"]]]).drop_duplicates(["beta", "lr"])
    found = [Found(finding, best, True) for finding in _of_length(best, verdicts)]
    for row in examined.sort_values("quality_selection", kind="stable").to_dict("records"):
        is_best = row["beta"] == best["beta"] and row["lr"] == best["lr"]
        of_point = _of_point(results, files, row, best, is_best)
        found += [Found(finding, row, is_best) for finding in of_point if is_best or finding.severity != "note"]
    for name, rows in (("beta", best_lrs), ("lr", study[study.beta == best["beta"]])):
        found += _of_grid(name, rows.sort_values(name), best)
    return _merged(found)


def _of_point(results: Results, files: PointFiles, row: Row, best: Row, is_best: bool) -> Iterator[Finding]:
    """Yield what is found of one point.

    Log-probs and the share of responses that end are means over its seeds; losses and repetition are the first one's.
    """
    beta, lr, first, closer = row["beta"], row["lr"], row["identities"][0], _closer(row, best, is_best)
    quality, error = row["quality_selection"], row["quality_selection_se"]
    is_worse = is_above(best["quality_selection"], best["quality_selection_se"], quality, error)
    if row["metric"] == "win_rate":
        is_worse |= is_above(0.5, 0.0, quality, error)
    if (logps := files.chosen_logps(row["identities"])) is not None:
        of_best = None if is_best else files.chosen_logps(best["identities"])
        best_change = None if of_best is None else float((of_best[1] - of_best[0]).mean())
        yield from that_fired(displacement(*logps, is_worse, best_change, lr))
    losses, norm = files.training(first)
    yield from that_fired(
        loss_at_start(losses, norm, _distance_moved(row), None if is_best else _distance_moved(best), is_worse),
        loss_above_start(losses, files.held_out_losses(first), is_worse, beta, lr),
    )
    starts_from_sft = row["init"] == "sft"  # whose samples are those of the baseline, where this is the SFT model
    if (repeated := files.repeated(first)) is not None:
        initial = files.repeated(first, "baseline") if starts_from_sft else None
        yield from that_fired(repetition(repeated, initial, closer))
    finished = float(np.mean([results.finished[identity] for identity in row["identities"]]))
    before = files.baseline_unfinished(first) if starts_from_sft else None
    yield from that_fired(unfinished(1 - finished, before, closer))
    yield from that_fired(beyond_sft(row["kl_token"], row["kl_token_se"], files.sft_distance(first), closer))


def _distance_moved(row: Row) -> DistanceMoved:
    return DistanceMoved(*(row[name] for name in ("beta", "lr", "kl_sequence", "kl_sequence_se")))


def _closer(row: Row, best: Row, is_best: bool) -> dict[str, str]:
    """Return the overrides of a run that stays closer to the initial model, or shows where leaving it begins.

    For the selected point a stronger regularization: a larger beta where that is what it means, else a smaller lr. For
    another one the value halfway to the selected point's.
    """
    beta, lr = row["beta"], row["lr"]
    if is_best and METHODS[row["method"]].needs_reference:
        return {"beta": values_text([rounded(3 * beta), rounded(10 * beta)]), "lr": f"{lr:g}"}
    if is_best:
        return {"beta": f"{beta:g}", "lr": values_text([rounded(lr / 3), rounded(lr / 10)])}
    if beta != best["beta"]:
        return {"beta": f"{rounded((beta * best['beta']) ** 0.5):g}", "lr": f"{lr:g}"}
    return {"beta": f"{beta:g}", "lr": f"{rounded((lr * best['lr']) ** 0.5):g}"}


def _of_grid(name: str, rows: pd.DataFrame, best: Row) -> list[Found]:
    """Return what the quality and margins along one axis of the grid show. rows: ascending."""
    records = rows.to_dict("records")
    grid = [
        GridPoint(r[name], r["quality_selection"], r["quality_selection_se"], r["reward_margin"] / r["beta"])
        for r in records
    ]
    position = next((i for i, record in enumerate(records) if record[name] == best[name]), None)
    if position is None:
        return []
    fixed = {"lr": f"{best['lr']:g}"} if name == "beta" else {"beta": f"{best['beta']:g}"}
    found = [Found(_with(finding, fixed), best, True) for finding in that_fired(border(name, grid, position))]
    if (result := over_optimized(name, grid, position)) is not None:
        finding, worst = result
        found.append(Found(_with(finding, fixed), next(r for r in records if r[name] == worst), False))
    return found


def _with(finding: Finding, overrides: dict[str, str]) -> Finding:
    return finding._replace(overrides={**overrides, **finding.overrides})


def _of_length(best: Row, verdicts: pd.DataFrame) -> Iterator[Finding]:
    """Yield what length explains of the selected point's win rate, on the reporting prompts."""
    if best["metric"] != "win_rate" or verdicts.empty:
        return
    rows = verdicts[verdicts.identity.isin(best["identities"]) & ~verdicts.further & verdicts.reporting.astype(bool)]
    values, lengths = rows.groupby("index")[["value", "length"]].mean().to_numpy(float).T
    yield from that_fired(length_explains(values, lengths, best["lr"]))


def _merged(found: list[Found]) -> list[Found]:
    """Return one finding a rule of the points that were not selected: the worst, which names the others."""
    merged: dict[Any, list[Found]] = {}
    for one in found:
        merged.setdefault((one.finding.rule, one.is_selected), []).append(one)
    kept = []
    for several in merged.values():
        first, *others = sorted(several, key=lambda one: SEVERITIES.index(one.finding.severity))
        names = "; ".join(_difference(one.point, first.point) for one in others)
        text = f"{first.finding.text}; also at {names}" if names else first.finding.text
        kept.append(first._replace(finding=first.finding._replace(text=text)))
    return kept


def _difference(point: Row, other: Row) -> str:
    """Return in which of beta and lr a point differs from another one."""
    return ", ".join(f"{name} {point[name]:g}" for name in ("beta", "lr") if point[name] != other[name])
