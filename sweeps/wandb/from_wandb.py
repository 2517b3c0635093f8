"""A sweep as W&B has it, as a folder and a store that aggregation reads like any other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from src.errors import ConfigError, StageError
from src.progress import RunProgress
from src.store.store import DONE
from src.tracking.following import logged_in
from src.tracking.sweep import FILE, JOB_TYPE

SCHEME = "wandb://"
KINDS = ("sft", "reference", "align", "generate", "evaluate")  # of stages; a run's other files are W&B's own


def fetch(address: str, output_dir: Path | None = None) -> Path:
    """Download what aggregation needs of `wandb://ENTITY/PROJECT/GROUP` and is not there yet. Returns the folder of the
    sweep, below `output_dir` (outputs/wandb/ENTITY/PROJECT when not given).

    Raises ConfigError when there is no such sweep, StageError when W&B does not answer.
    """
    parts = address.removeprefix(SCHEME).split("/", 2)
    if len(parts) != 3 or not all(re.fullmatch(r"\w[\w.=+-]*", part) for part in parts):
        raise ConfigError(f"{address}: must be {SCHEME}ENTITY/PROJECT/GROUP")
    entity, project, group = parts
    if not logged_in():
        raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY")
    root = output_dir or Path("outputs") / "wandb" / entity / project
    folder = root / "sweeps" / group

    import requests
    import wandb

    try:
        runs = list(wandb.Api(timeout=30).runs(f"{entity}/{project}", filters={"group": group}, include_sweeps=False))
        concluded = sorted((run for run in runs if run.job_type == JOB_TYPE), key=lambda run: str(run.created_at))
        with RunProgress() as report:
            for number, run in enumerate(runs if concluded else []):
                report("from W&B", number, len(runs))
                _download(run, root, folder, run.id == concluded[-1].id)
            report("from W&B", len(runs), len(runs))
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise StageError(f"{address}: W&B did not answer as expected ({error})") from error
    if not concluded:
        found = f"{len(runs)} runs, but none that has its points" if runs else "no runs"
        raise ConfigError(
            f"{address}: {found}; what is in the group is told by the sweep itself, or by `python -m "
            "sweeps.wandb_sync DIR` where its store is"
        )
    print(f"{address}: {len(runs)} runs, in {root}", file=sys.stderr)
    return folder


def _download(run: Any, root: Path, folder: Path, is_sweep: bool) -> None:
    files = sorted(run.files(per_page=100), key=lambda file: file.name.endswith(f"/{DONE}"))  # what says so comes last
    done = {
        folder for folder in {Path(file.name).parent for file in files} if (root / "store" / folder / DONE).exists()
    }
    for file in files:
        kind = file.name.partition("/")[0]
        if is_sweep and file.name == FILE:
            folder.mkdir(parents=True, exist_ok=True)
            file.download(root=str(folder), replace=True)
        elif kind in KINDS and ".." not in file.name and Path(file.name).parent not in done:
            file.download(root=str(root / "store"), replace=True)
