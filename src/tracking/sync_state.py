"""What a sink already has of each run, noted below OUTPUT_DIR/tracking once the sink has confirmed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.store.files import read_json, write_json
from src.tracking.sink import Sink


@dataclass
class SyncState:
    """The sync state of one run in one sink, read from its file."""

    file: Path
    sink: Sink

    @staticmethod
    def of(output_dir: Path, sink: Sink, run: str) -> SyncState:
        return SyncState(output_dir / "tracking" / sink.name / f"{run}.json", sink)

    def is_synced(self, content: Any) -> bool:
        """Return whether the sink has exactly this content of the run."""
        return self._read().get("content") == content

    @property
    def last_step(self) -> int:
        """The last training step that was confirmed; -1 for none."""
        return self._read().get("last_step", -1)

    def mark_synced(self, content: Any, last_step: int, url: str | None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"target": self.sink.target, "content": content, "last_step": last_step, "url": url})

    def _read(self) -> dict[str, Any]:
        try:
            state = read_json(self.file)
        except FileNotFoundError:
            return {}
        return state if state["target"] == self.sink.target else {}
