"""Which files of a sweep and of its points' stages a study.zip has: all that results are made of, and no model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from src.errors import ConfigError, DamagedFile
from src.store.files import find, read_checksummed_json, read_json
from src.store.integrity import DONE, STAGE_FILE, WEIGHTS, WEIGHTS_REMOVED, find_damage
from src.store.store import COUNTS_FILE, JUDGE_FILE, SMALL_FILES
from src.store.sweep_folder import SweepFolder, with_reporting

# Not among them: weights, tokenizers and configs of models, rows and tokens that were trained on, log-probs of a
# reference. A command that needs one of these computes it again.
STAGE_FILES = (*SMALL_FILES, COUNTS_FILE, JUDGE_FILE)
MODEL_KINDS = ("sft", "align")  # of stages that publish a model
# Says in the archive that a model was there, as `keep_checkpoints` says it in a store.
REMOVED_MARK = (json.dumps({"removed": "left out of the study"}, indent=1) + "\n").encode()

Content = Path | bytes


class StudyContents:
    """The files of a study: name in the archive -> the file, or what it contains."""

    def __init__(self, folder: SweepFolder) -> None:
        """Find and check all files.

        Raises ConfigError for a sweep without results or that has not been aggregated, DamagedFile naming a file of a
        stage that is damaged or missing.
        """
        self.folder, self.record = folder, folder.read()
        self.root = folder.results_root(self.record)
        self.num_done = sum(self._is_done(point["identity"]) for point in self.record["points"])
        if not self.num_done:
            raise ConfigError(f"{folder.path}: none of its {len(self.record['points'])} points has a result to pack")
        for needed in (folder.points_csv, folder.best_yaml, folder.tables, folder.report):
            if not needed.exists():
                raise ConfigError(f"{needed}: missing; python -m sweeps.aggregate {folder.path} makes it")
        self.stages = self._stages()
        self.files: dict[str, Content] = {}
        for path in _files_in(folder.results()):
            if path.suffix != ".png":  # the same figures as the SVGs beside them, which are smaller
                self.files[f"sweeps/{folder.name}/{path.relative_to(folder.path).as_posix()}"] = path
        for stage in self.stages:
            self._add_stage(stage)

    @property
    def num_points(self) -> int:
        return len(self.record["points"])

    def _is_done(self, result: str) -> bool:
        return (self.root / "evaluate" / result / DONE).exists()

    def _stages(self) -> list[Path]:
        """Return the folders of all stages that the results of the points were computed from, theirs included."""
        found: dict[str, Path] = {}
        results: list[str] = []
        for point in self.record["points"]:
            point = with_reporting(point, self._is_done)
            results += filter(self._is_done, (*point.get("earlier", ()), point["identity"]))
        todo = [self.root / "evaluate" / result for result in results]
        while todo:
            folder = todo.pop()
            if folder.name in found:
                continue
            found[folder.name] = folder
            for role, identity in self._description(folder)["upstream"].items():
                if identity in found:
                    continue
                upstream = [path.parent for path in find(self.root, f"[!.]*/{identity}/{DONE}")]
                if not upstream:
                    raise DamagedFile(
                        f"{folder}: made from {role} {identity}, which the store does not have; run the sweep again"
                    )
                todo += upstream
        return sorted(found.values())

    def _description(self, folder: Path) -> dict[str, Any]:
        """Return stage.json of a finished stage whose packed files are as they were published."""
        if damage := find_damage(folder, folder.name, names=STAGE_FILES):
            raise DamagedFile(f"{damage}; run the sweep again to remake it")
        try:
            description = read_json(folder / STAGE_FILE)
        except FileNotFoundError:
            raise DamagedFile(f"{folder / STAGE_FILE}: missing; run the sweep again to remake it") from None
        if not isinstance(description.get("upstream"), dict):
            raise DamagedFile(f"{folder / STAGE_FILE}: damaged, it has no upstream; run the sweep again to remake it")
        return description

    def _add_stage(self, folder: Path) -> None:
        published = read_checksummed_json(folder / DONE)["files"]
        name = f"store/{folder.relative_to(self.root).as_posix()}"
        for file in sorted({DONE, *published}.intersection(STAGE_FILES)):
            self.files[f"{name}/{file}"] = folder / file
        if folder.parent.name in MODEL_KINDS and any(PurePath(file).match(WEIGHTS) for file in published):
            self.files[f"{name}/{WEIGHTS_REMOVED}"] = REMOVED_MARK


def _files_in(paths: list[Path]) -> Iterator[Path]:
    """Yield the files among some paths, and in those of them that are folders, without drafts and hidden ones."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("."):
                yield file
