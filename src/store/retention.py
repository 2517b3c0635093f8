"""What stays on disk after a sweep: models as `keep_checkpoints` says, and no work directory of a finished stage.

Points are given as sweep.json records their stages: role (sft, reference, align, ...) -> identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import yaml

from src.errors import ConfigError, warn
from src.store.files import read_bytes, read_json
from src.store.lease import in_use
from src.store.store import STAGE_FILE, StageName, Store, full_run_id

PointStages = Mapping[str, str]


def apply_retention(store: Store, points: Sequence[PointStages], keep: str, best: Set[str] | None) -> None:
    """Apply `keep` (all, best, none) to the aligned models of the points.

    A model stays while a point still waits for it, and with `best` when a selected result was computed with it. best:
    identities of selected results; None when they are not known, and then `best` keeps all models.
    """
    for kind, identity in (work.relative_to(store.root).parts[::2] for work in store.root.glob("*/.work/*")):
        stage = StageName(kind, identity)
        # A process killed between publication and clean-up leaves this behind.
        if store.has_weights(stage) and not in_use(store.work(stage)):
            store.discard_work_dir(stage)
    protected = _protected_models(store, keep, best)
    if protected is not None:
        for align in {stages["align"] for stages in points} - protected:
            release_model(store, points, align)


def apply_retention_after_rung(
    store: Store, points: Sequence[PointStages], keep: str, ended: Set[str], best: Set[str] | None
) -> None:
    """Apply `keep` to the models of partial runs, and delete the checkpoints of points that are not promoted.

    ended: identities of the results of points that stay in this rung; best: as in apply_retention.
    """
    protected = _protected_models(store, keep, best)
    for stages in points:
        align = StageName("align", stages["align"])
        is_partial = full_run_id(align.identity) != align.identity
        if not is_partial or not store.is_done(StageName("evaluate", stages["evaluate"])):
            continue
        if protected is not None and align.identity not in protected:
            store.remove_weights(align)
        if stages["evaluate"] in ended and not in_use(store.work(align)):
            store.discard_work_dir(align)


def best_results_in_store(store: Store) -> set[str] | None:
    """Return the identities of all results that a sweep of this store has selected as best.

    None, with a warning, when a best.yaml cannot be read: any model may be one that it names.
    """
    best: set[str] = set()
    for path in store.sweeps.glob("*/best.yaml"):
        try:
            for methods in (yaml.safe_load(read_bytes(path).decode()) or {}).values():
                best.update(identity for entry in methods.values() for identity in entry.get("identities") or [])
        except FileNotFoundError:  # its sweep has just been moved away
            continue
        except (AttributeError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            warn(f"{path}: damaged, so keep_checkpoints=best removes no model ({reason}); delete or mend it")
            return None
    return best


def release_model(store: Store, points: Sequence[PointStages], align: str) -> None:
    """Remove the aligned model with this identity once every point that uses it is done."""
    results = (stages["evaluate"] for stages in points if stages["align"] == align)
    if all(store.is_done(StageName("evaluate", result)) for result in results):
        store.remove_weights(StageName("align", align))


def _protected_models(store: Store, keep: str, best: Set[str] | None) -> set[str] | None:
    """Return the identities of the models that `keep` protects; None for all."""
    if keep == "none":
        return set()
    if keep == "all" or best is None:
        return None
    models: set[str] = set()
    for result in best:  # perhaps of another sweep
        path = store.root / "evaluate" / result / STAGE_FILE
        try:
            models.add(read_json(path)["upstream"]["align"])
        except FileNotFoundError:
            continue
        except (ConfigError, KeyError, TypeError):
            warn(f"{path}: damaged, so keep_checkpoints=best removes no model")
            return None
    return models
