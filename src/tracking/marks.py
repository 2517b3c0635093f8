"""What W&B has, written down below OUTPUT_DIR/wandb/complete when it has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.store.files import read_json, write_json
from src.store.store import Store
from src.tracking.session import Place


def file_of(store: Store, name: str) -> Path:
    return store.output_dir / "wandb" / "complete" / f"{name}.json"


def has(store: Store, run: str, content: Any, place: Place) -> bool:
    """Whether W&B has this of a run; offline: whether its files have."""
    try:
        mark = read_json(file_of(store, run))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return mark["content"] == content and place.mode in (mark["mode"], "offline")


def note(store: Store, run: str, content: Any, place: Place, url: str | None) -> None:
    file = file_of(store, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"content": content, "url": url, "mode": place.mode})
