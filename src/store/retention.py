"""What stays on disk after a plan: models as `keep` says, and nothing of interrupted attempts at finished stages."""

from __future__ import annotations

import yaml

from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.files import read_json
from src.store.lease import in_use
from src.store.store import STAGE_FILE, Store


def apply_retention(store: Store, plan: Plan, keep: str, best: set[str]) -> None:
    """Apply `keep` (all, best, none) to the aligned models of a plan; best: identities of results that were chosen.

    A model that a point still waits for, or (keep_checkpoints=best) that rests under any chosen result, stays.
    """
    kept = {_model_of(store, result) for result in best} if keep == "best" else set()
    for identity, stage in plan.stages.items():
        if stage.kind == "align" and keep != "all" and identity not in kept:
            release(store, plan, stage)
        if store.is_done(stage) and store.work(stage).exists() and not in_use(store.work(stage)):
            store.clean_up_work_dir(stage)  # a kill came between publication and this


def after_rung(store: Store, plan: Plan, ending: set[str], best: set[str]) -> None:
    """When a rung of a search has ended: of the models that stopped early only what `keep` says stays, and of results
    in `ending`, which go no further, nothing to go on from.

    best: identities of results that any sweep has chosen.
    """
    keep = plan.points[0].keep_checkpoints
    kept = {_model_of(store, result) for result in best} if keep == "best" else set()
    for own in plan.point_stages:
        (align,) = (plan.stages[i] for i in own if plan.stages[i].kind == "align")
        if align.stop_fraction == 1 or not store.is_done(plan.stages[own[-1]]):
            continue
        if keep != "all" and align.identity not in kept:
            store.remove_weights(align)
        if own[-1] in ending and not in_use(store.work(align)):
            store.discard_work_dir(align)


def best_results_in_store(store: Store) -> set[str]:
    """Results that a sweep of this store has found best."""
    best: set[str] = set()
    for path in store.sweeps.glob("*/best.yaml"):
        for methods in (yaml.safe_load(path.read_text()) or {}).values():
            best.update(identity for entry in methods.values() for identity in entry.get("identities") or [])
    return best


def release(store: Store, plan: Plan, align: Stage) -> None:
    """Remove an aligned model once every point of the plan that rests on it is done."""
    waiting = (own[-1] for own in plan.point_stages if align.identity in own)
    if all(store.is_done(plan.stages[result]) for result in waiting):
        store.remove_weights(align)


def _model_of(store: Store, result: str) -> str | None:
    """The align stage under a result, which may be another sweep's."""
    try:
        return read_json(store.root / "evaluate" / result / STAGE_FILE)["upstream"]["align"]
    except FileNotFoundError:
        return None
