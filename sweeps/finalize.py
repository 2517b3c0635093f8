"""The last step of a sweep, by the command itself or by the aggregation job: final states, the report, retention."""

from __future__ import annotations

from pathlib import Path

from src.errors import PointFailure, SweepFailed
from src.store.retention import apply_retention, best_results_in_store
from src.store.store import StageName
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import aggregate
from sweeps.search.record import write_states


def finalize(path: Path, failures: dict[str, PointFailure]) -> None:
    """Write the final state of every point, select the best, and remove the models that need not be kept.

    Between rungs of a search only the states are written. path: the sweep's folder. failures: identity of a point's
    result -> why it is missing. Raises SweepFailed when there are any.
    """
    folder = SweepFolder(path)
    record, store = folder.read(), folder.store
    search, points = record["search"], record["points"]
    recorded = {p["identity"]: PointFailure(p["state"], p["error"]) for p in points if p["error"] is not None}
    failures = {
        result: failure
        for result, failure in (recorded | failures).items()
        if not store.is_done(StageName("evaluate", result))
    }
    state, failed = "failed" if failures else "done", f"{len(failures)} of {len(points)} points failed"
    if search is not None and search["rung"] < len(search["rungs"]):
        write_states(folder, record, state, failures)
        rung = search["rung"]
        print(f"{folder.name}: rung {rung} is done; rerun the same command to start rung {rung + 1}", flush=True)
        if failures:
            raise SweepFailed(
                f"{failed}; rerun the same command to retry them first, or with hydra.launcher.retry_failed=false to "
                "continue without them"
            )
        return
    write_states(folder, record, "aggregating", failures)
    best = aggregate([folder])
    selected = best_results_in_store(store) | {i for seeds in best.identities for i in seeds}
    apply_retention(store, [point["stages"] for point in points], record["keep_checkpoints"], selected)
    write_states(folder, record, state, failures)  # the final state last, so that waiters find complete results
    if failures:
        raise SweepFailed(f"{failed}; rerun the same command to retry only those")
