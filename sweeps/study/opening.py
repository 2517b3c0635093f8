"""Open a sweep wherever it is: in its folder, in a study.zip, or in W&B."""

from __future__ import annotations

from pathlib import Path

from src.errors import ConfigError
from src.store.sweep_folder import SweepFolder
from sweeps.study.archive import SUFFIX, unpack
from sweeps.wandb.from_wandb import SCHEME, fetch


def open_sweep(name: str, unpacked: Path) -> SweepFolder:
    """Return the folder of a sweep that is given by its folder, a study.zip or a group in W&B.

    unpacked: a folder below which a study.zip is unpacked.
    """
    if not name.endswith(SUFFIX) or Path(name).is_dir():
        path = (fetch(name) if name.startswith(SCHEME) else Path(name)).resolve()
        return SweepFolder.open(path)
    target = unpacked / str(len(list(unpacked.iterdir())))
    study = unpack(Path(name), target)
    if study.changes:
        more = f" ({len(study.changes) - 1} more files are not as they were packed)" if len(study.changes) > 1 else ""
        raise ConfigError(
            f"{name}: {study.changes[0]}{more}; python -m sweeps.reproduce {name} says what else is different then"
        )
    return SweepFolder.open(study.folder.path.resolve())
