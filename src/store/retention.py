"""Which aligned models stay on disk: those that a sweep of the store still needs, as its `keep_checkpoints` says.

Whoever has published the result of a point calls `release_models`, so that models go while the sweep runs. A sweep
needs the models of points without a result, with `all` those of all its points, and with `best` those that it has
selected (best.yaml, and `selected` in sweep.json) or may still select. What is not needed now is not needed later, so
nothing depends on who decides first or is killed when.

Points are given as sweep.json records their stages: role (sft, reference, align, ...) -> identity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from src.errors import ConfigError, DamagedFile, warn
from src.store.files import find, read_bytes, read_json
from src.store.integrity import WEIGHTS, find_damage
from src.store.lease import Lease, in_use
from src.store.selectable import STUDY, Measured, selectable
from src.store.store import RESULT_FILES, STAGE_FILE, StageName, Store, full_run_id, read_result
from src.store.sweep_folder import SweepFolder

PointStages = Mapping[str, str]


def release_models(folder: SweepFolder, published: Collection[str]) -> None:
    """Remove the models of a running sweep that are not needed any more once these results are there.

    published: identities of results; only their studies are looked at. What cannot be removed now is left to the next
    call, and at last to the end of the sweep.
    """
    try:
        record = folder.read()
        if record["keep_checkpoints"] != "all":
            studies = {_study(point) for point in record["points"] if point["identity"] in published}
            remove_models(folder.store, [p["stages"] for p in record["points"] if _study(p) in studies])
    except (OSError, ConfigError) as error:  # of what is done: no reason for it to fail
        warn(f"{folder.name}: models that are not needed any more stay for now ({error})")


def remove_models(store: Store, points: Sequence[PointStages], settled: SweepFolder | None = None) -> None:
    """Remove those aligned models of the points that no sweep of the store needs and no stage computes from.

    settled: the sweep that has just written its best.yaml, if any.
    """
    models = {stages["align"] for stages in points if find(store.dir(_align(stages["align"])), WEIGHTS)}
    models -= {stages["align"] for stages in points if not store.is_done(_evaluate(stages["evaluate"]))}
    needed = _needed(store, models, settled) if models else models
    for align in map(_align, sorted(models - needed)):
        # Under its lease: who needs the model nevertheless computes it again before this or after it, not meanwhile.
        with Lease(store.work(align), lambda holder: True) as lease:
            if lease.held:
                store.remove_weights(align, unless=partial(_is_read, store, align.identity))
                store.clean_up_work_dir(align)


def discard_finished_work(store: Store) -> None:
    """Delete the work directories of finished stages, which a process killed between publication and clean-up left."""
    for kind, identity in (work.relative_to(store.root).parts[::2] for work in store.root.glob("*/.work/*")):
        stage = StageName(kind, identity)
        if store.has_weights(stage) and not in_use(store.work(stage)):
            store.discard_work_dir(stage)


def discard_checkpoints(store: Store, points: Sequence[PointStages], ended: Collection[str]) -> None:
    """Delete what partial runs would be resumed from. ended: results of the points that will not be."""
    for stages in points:
        align = _align(stages["align"])
        is_partial = full_run_id(align.identity) != align.identity
        if is_partial and stages["evaluate"] in ended and not in_use(store.work(align)):
            store.discard_work_dir(align)


def _align(identity: str) -> StageName:
    return StageName("align", identity)


def _evaluate(identity: str) -> StageName:
    return StageName("evaluate", identity)


def _study(point: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(point[name] for name in STUDY)


def _needed(store: Store, models: set[str], settled: SweepFolder | None) -> set[str]:
    """Return which of the models a sweep of the store needs: all of them where that cannot be read."""
    needed: set[str] = set()
    for folder in SweepFolder.all_in(store.output_dir):
        try:
            record = folder.read()
        except FileNotFoundError:  # it has just been moved away
            continue
        except ConfigError as error:
            warn(f"{error}; it may need any model, so none is removed")
            return models
        has_ended = record.get("state") == "done" and _in_last_rung(record)
        just_ended = settled is not None and settled.path.resolve() == folder.path.resolve()
        needed |= _needed_by_points(store, record, models, has_ended or just_ended)
    selected = _selected(store)
    return models if selected is None else needed | selected


def _needed_by_points(store: Store, record: Mapping[str, Any], models: set[str], is_settled: bool) -> set[str]:
    """Return which of the models points of a sweep.json need. is_settled: it says what was selected of them."""
    users = [point for point in record["points"] if point["stages"]["align"] in models]
    if record["keep_checkpoints"] != "all":
        results = {p["identity"] for p in users if not store.is_done(_evaluate(p["identity"]))}
        if record["keep_checkpoints"] == "best":
            results |= set(record.get("selected") or ())
            results |= _may_be_selected(store, record, {_study(point) for point in users}, is_settled)
        users = [point for point in users if point["identity"] in results]
    return {point["stages"]["align"] for point in users}


def _may_be_selected(
    store: Store, record: Mapping[str, Any], studies: set[tuple[str, ...]], is_settled: bool
) -> set[str]:
    """Return the results in these studies of a sweep.json that the sweep may still select, beyond its best.yaml."""
    search, points = record["search"], list[Measured]()
    for point in (p for p in record["points"] if _study(p) in studies):
        competes = search is None or point["rung"] == len(search["rungs"])
        if not competes and _in_last_rung(record):
            continue  # it was not promoted
        quality, num_prompts = _quality(store, point["identity"]) if competes else (None, 0)
        if quality == quality:  # not NaN, which is never selected
            key = _study(point), point["beta"], point["lr"]
            points.append(Measured(point["identity"], *key, quality, num_prompts))
    open_studies = {point.study for point in points if point.quality is None}
    return selectable((p for p in points if not is_settled or p.study in open_studies), record["select"])


def _in_last_rung(record: Mapping[str, Any]) -> bool:
    return record["search"] is None or record["search"]["rung"] == len(record["search"]["rungs"])


def _quality(store: Store, result: str) -> tuple[float | None, int]:
    """Return the mean quality on the selection prompts and their number; None for a result that is to be computed."""
    folder = store.dir(_evaluate(result))
    try:
        if find_damage(folder, result, names=RESULT_FILES) is not None:
            return None, 0
        selection = read_result(folder)["splits"]["selection"]
        return float("nan") if selection["value"] is None else selection["value"], selection["n"]
    except (FileNotFoundError, ConfigError, KeyError):
        return None, 0


def _selected(store: Store) -> set[str] | None:
    """Return the models of all results that a sweep of this store has selected as best.

    None, with a warning, when a best.yaml or what it names cannot be read: any model may be one of them.
    """
    models: set[str] = set()
    for path in store.sweeps.glob("*/best.yaml"):
        try:
            table = yaml.safe_load(read_bytes(path).decode()) or {}
            entries = [entry for methods in table.values() for entry in methods.values()]
            results = [identity for entry in entries for identity in entry.get("identities") or []]
        except FileNotFoundError:  # its sweep has just been moved away
            continue
        except (AttributeError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            warn(f"{path}: damaged, so keep_checkpoints removes no model ({reason}); delete or mend it")
            return None
        for result in results:
            stage = store.root / "evaluate" / result / STAGE_FILE
            try:
                models.add(read_json(stage)["upstream"]["align"])
            except FileNotFoundError:
                continue
            except (ConfigError, KeyError, TypeError):
                warn(f"{stage}: damaged, so keep_checkpoints removes no model")
                return None
    return models


def _is_read(store: Store, model: str) -> bool:
    """Return whether a process reads the model, for a sweep or not: to sample from it, or to measure its capability."""
    kinds = ("generate", "capability")
    for path in (path for kind in kinds for path in find(store.root, f"{kind}/.work/*/attempt-*/{STAGE_FILE}")):
        try:
            checkpoint = read_json(path)["upstream"]["checkpoint"]
        except (FileNotFoundError, DamagedFile, KeyError, TypeError):  # given up, or not yet whole
            continue
        if checkpoint == model and in_use(path.parents[1]):
            return True
    return False
