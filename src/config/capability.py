"""The part of the schema that says which tasks of lm-eval measure what alignment costs in capability. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from src.config.fields import folder_name, number, random_seed
from src.config.paths import is_dir
from src.errors import ConfigError

MAX_SHOTS = 1000
MAX_DOCUMENTS = 10**7


@dataclass
class Capability:
    name: str = folder_name("none")
    tasks: list[str] = field(default_factory=list)  # of lm-eval, or of task_files
    metrics: dict[str, str] = field(default_factory=dict)  # task -> METRIC or "METRIC,FILTER"; others: their first
    num_fewshot: dict[str, int] = number(default_factory=dict, maximum=MAX_SHOTS)  # task -> examples; others: their own
    limit: int | None = number(None, minimum=2, maximum=MAX_DOCUMENTS)  # documents of each task; null: all
    seed: int = random_seed()  # of the documents that are drawn
    chat_template: bool = True
    task_files: str | None = None  # folder of tasks of one's own
    batch_size: int = number(8, minimum=1, maximum=10**6)


def check_capability(capability: Capability) -> None:
    """Raise ConfigError for tasks without an option of the group, an option without tasks, and a missing folder."""
    tasks, folder = capability.tasks, capability.task_files
    if capability.name == "none":
        if set_key := next((key for key in ("tasks", "task_files", "limit") if getattr(capability, key)), None):
            raise ConfigError(
                f"capability.{set_key}={getattr(capability, set_key)}: capability=none measures nothing; add "
                "capability=subset or capability=whole"
            )
        return
    if not tasks:
        raise ConfigError("capability.tasks=[]: name at least one task of lm-eval, or use capability=none")
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise ConfigError(f"capability.tasks={tasks}: {twice} is named twice")
    if folder is not None and not is_dir("capability.task_files", folder):
        raise ConfigError(f"capability.task_files={folder}: no such folder")
    if folder is not None and not any(Path(folder).glob("*.yaml")):  # before all that is in a wrong one is read
        raise ConfigError(f"capability.task_files={folder}: no task, a file that ends in .yaml, is in this folder")
