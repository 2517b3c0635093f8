"""Upload to W&B what it has not: `python -m sweeps.wandb_sync DIR`, of a sweep's folder, or of all in an output_dir.

The store says what there is, W&B what it has: nothing is uploaded twice, and a second call finds nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.config.schema import Tracking
from src.errors import ConfigError, StageError, report_errors
from src.progress import RunProgress
from src.store.store import DONE, Store
from src.store.sweep_folder import SweepFolder
from src.tracking.following import logged_in, tracking_of
from src.tracking.mirror import Mirror
from src.tracking.runs import in_store, of_sweep
from src.tracking.session import Place
from src.tracking.sweep import SweepMirror


def mirrors_of(folder: Path, project: str | None, entity: str | None) -> list[Mirror | SweepMirror]:
    """Of what a folder has. Raises ConfigError when it is neither a sweep's nor an output_dir."""
    if SweepFolder(folder).exists():
        store, own = Store(folder.absolute().parent.parent), tracking_of(folder)
        place = Place(project or own.project, entity or own.entity, "online")
        runs = of_sweep(folder, store)
        return [*(Mirror(run, store, place) for run in runs), SweepMirror(folder, store, place)]
    if (folder / "store" / "evaluate").is_dir():
        store, own = Store(folder), Tracking()
        place = Place(project or own.project, entity or own.entity, "online")
        results = sorted(done.parent.name for done in (store.root / "evaluate").glob(f"*/{DONE}"))
        return [Mirror(run, store, place) for run in in_store(store, results, None)]
    raise ConfigError(f"{folder}: no sweep.json and no store there; give a sweep's folder, or an output_dir")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.wandb_sync", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo, or an output_dir")
    parser.add_argument("--project", help="W&B project; the sweep's own when not given")
    parser.add_argument("--entity", help="W&B entity; the sweep's own, or your default, when not given")
    arguments = parser.parse_args()
    with report_errors():
        mirrors = mirrors_of(arguments.dir, arguments.project, arguments.entity)
        if not logged_in():
            raise ConfigError("not logged in to W&B: `wandb login`, or export WANDB_API_KEY")
        import wandb

        missing = [mirror for mirror in mirrors if not mirror.complete]
        uploaded = 0
        with RunProgress() as report:
            for number, mirror in enumerate(missing):
                report("W&B", number, len(missing))
                try:
                    uploaded += mirror.advance(live=False)
                except wandb.Error as error:
                    raise StageError(
                        f"W&B did not take {mirror.name} ({error}); the same command goes on from there"
                    ) from error
            if missing:
                report("W&B", len(missing), len(missing))
        print(f"{uploaded} of {len(mirrors)} runs uploaded, {len(mirrors) - len(missing)} were there")
        if uploaded < len(missing):
            print(f"{len(missing) - uploaded} have not ended yet: the same command uploads them when they have")
    return 0


if __name__ == "__main__":
    sys.exit(main())
