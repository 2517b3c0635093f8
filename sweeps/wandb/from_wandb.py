"""Downloads a sweep from W&B into a folder and a store that aggregation reads like any other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from src.errors import ConfigError, StageError
from src.progress import RunProgress
from src.store.store import DONE, Store
from src.store.sweep_folder import SweepFolder
from src.store.usage import KINDS
from src.tracking.sync import SWEEP_JOB_TYPE
from src.tracking.wandb_login import logged_in

SCHEME = "wandb://"


def fetch(address: str, output_dir: Path | None = None) -> Path:
    """Download what aggregation needs of `wandb://ENTITY/PROJECT/GROUP`, and return the folder of the sweep.

    output_dir: what to download into, by default outputs/wandb/ENTITY/PROJECT; finished stages there are not downloaded
    again.

    Raises ConfigError when there is no such sweep, StageError when W&B does not answer.
    """
    parts = address.removeprefix(SCHEME).split("/", 2)
    if len(parts) != 3 or not all(re.fullmatch(r"\w[\w.=+-]*", part) for part in parts):
        raise ConfigError(f"{address}: must be {SCHEME}ENTITY/PROJECT/GROUP")
    entity, project, group = parts
    if not logged_in():
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY")
    store = Store(output_dir or Path("outputs") / "wandb" / entity / project)
    folder = SweepFolder(store.sweeps / group)

    import requests
    import wandb

    try:
        runs = list(wandb.Api(timeout=30).runs(f"{entity}/{project}", filters={"group": group}, include_sweeps=False))
        aggregations = [run for run in runs if run.job_type == SWEEP_JOB_TYPE]
        with RunProgress() as report:
            for number, run in enumerate(runs if aggregations else []):
                report("from W&B", number, len(runs))
                _download_stages(run, store)
            if aggregations:
                folder.path.mkdir(parents=True, exist_ok=True)
                newest = max(aggregations, key=lambda run: str(run.created_at))
                newest.file(folder.record.name).download(root=str(folder.path), replace=True)
            report("from W&B", len(runs), len(runs))
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise StageError(f"{address}: W&B did not answer as expected ({error})") from error
    if not aggregations:
        problem = "found runs but no sweep record" if runs else "no runs"
        raise ConfigError(
            f"{address}: {problem}; upload it with `python -m sweeps.wandb_sync DIR` on the machine that has the store"
        )
    print(f"{address}: {len(runs)} runs, in {store.output_dir}", file=sys.stderr)
    return folder.path


def _download_stages(run: Any, store: Store) -> None:
    files = sorted(run.files(per_page=100), key=lambda file: file.name.endswith(f"/{DONE}"))  # DONE completes a stage
    parents = {Path(file.name).parent for file in files}
    done = {folder for folder in parents if (store.root / folder / DONE).exists()}
    for file in files:
        kind = file.name.partition("/")[0]
        if kind in KINDS and ".." not in file.name and Path(file.name).parent not in done:
            file.download(root=str(store.root), replace=True)
