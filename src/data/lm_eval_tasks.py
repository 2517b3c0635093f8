"""The tasks of lm-eval, an optional package, and those of a folder of one's own: their names, and their loading."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.config.overrides import did_you_mean
from src.errors import ConfigError, StageError, describe_failure


def task_manager(names: Collection[str], folder: str | None) -> Any:
    """Return lm-eval's index of tasks, with those of a folder: of these alone where all the names are tasks there.

    Reading the thousands of files that lm-eval brings takes seconds.
    """
    if folder is not None and {*names} <= {*(own := _index(folder, include_defaults=False)).all_subtasks}:
        return own
    return _index(folder, include_defaults=True)


@lru_cache(maxsize=4)
def _index(folder: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of is decided here
    return TaskManager(include_path=folder and Path(folder).absolute(), include_defaults=include_defaults)


def check_tasks(names: Sequence[str], metrics: dict[str, str], folder: str | None) -> None:
    """Raise ConfigError for a name that no task, group or tag has, and for a metric that a task does not list."""
    manager = task_manager(names, folder)
    for name in names:
        if (entry := manager.task_index.get(name)) is None:
            where = "" if folder is None else f", nor has capability.task_files={folder}"
            hint = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"capability.tasks: lm-eval has no task {name}{where}{hint}")
        listed = [str(metric.get("metric")) for metric in (entry.cfg or {}).get("metric_list") or ()]
        metric = metrics.get(name, "").partition(",")[0]
        if metric and listed and metric not in listed:
            raise ConfigError(f"capability.metrics.{name}={metrics[name]}: its metrics are {', '.join(listed)}")
        if folder is not None and entry.yaml_path is not None:
            _check_data_files(name, entry, Path(folder).resolve())


def _check_data_files(name: str, entry: Any, folder: Path) -> None:
    """Refuse data of a task in the folder that lies elsewhere: only what is in the folder is part of the identity."""
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") or {}
    if folder not in entry.yaml_path.resolve().parents:
        return
    for file in files.values() if isinstance(files, dict) else [files]:
        for one in file if isinstance(file, list) else [file]:
            path = (folder / str(one)).resolve()
            if "://" not in str(one) and (folder not in path.parents or not path.is_file()):
                raise ConfigError(
                    f"capability.task_files={folder}: data_files of {name} has {one}, which is no file in that folder; "
                    "put it there and name it relative to the folder"
                )


def load_task(manager: Any, name: str, folder: str | None, num_fewshot: int | None, seed: int) -> dict[str, Any]:
    """Return name -> task object of a task, or of all tasks of a group, as lm-eval's command line prepares them.

    num_fewshot: None for the task's own; a task that says 0 keeps it. Raises StageError when its data cannot be had.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        with contextlib.chdir(folder or "."):  # to which files of data are relative
            tasks = manager.load([name])["tasks"]
    except Exception as error:  # of the hub, of a file's content, or of a task's own code
        raise StageError(f"capability.tasks: {name} cannot be loaded: {describe_failure(error)}") from error
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own != 0 or num_fewshot is None:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=seed)
    return tasks
