"""What a sink already has of each run, noted below OUTPUT_DIR/tracking once the sink has confirmed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.store.files import read_json, write_json
from src.tracking.sink import Sink


class SyncState:
    """The sync state of one run in one sink; empty when it was written for another target."""

    def __init__(self, output_dir: Path, sink: Sink, run: str) -> None:
        self._file, self._target = output_dir / "tracking" / sink.name / f"{run}.json", sink.target

    def is_synced(self, content: Any) -> bool:
        """Return whether the sink has exactly this content of the run."""
        return self._read().get("content") == content

    @property
    def last_step(self) -> int:
        """The last training step that was confirmed; -1 for none."""
        return self._read().get("last_step", -1)

    def mark_synced(self, content: Any, last_step: int) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {"target": self._target, "content": content, "last_step": last_step})

    def _read(self) -> dict[str, Any]:
        state = read_json(self._file) if self._file.exists() else {}
        return state if self._target in ("", state.get("target")) else {}
