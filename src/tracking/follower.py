"""Tells W&B of runs while others compute them: `python -m src.tracking.follower OUTPUT_DIR DELAY`.

Lines of its stdin say what to tell, each as JSON: {"place": ..., "runs": [...]} or {"place": ..., "sweep": FOLDER}; its
end, that nothing is computed any more. What it tells lies in the store; whatever happens to it, nobody waits.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path

from src.store.store import Store
from src.tracking.mirror import Mirror
from src.tracking.runs import from_row
from src.tracking.session import Place
from src.tracking.sweep import SweepMirror

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks at the store
TOLD = " INFO told: "  # in the log, of a run that W&B has


class Inbox:
    """What stdin says, read beside."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ended = threading.Event()
        self._new: list[Mirror | SweepMirror] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> list[Mirror | SweepMirror]:
        with self._lock:
            new, self._new = self._new, []
        return new

    def _read(self) -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            place = Place(**asked["place"])
            new: list[Mirror | SweepMirror] = [
                Mirror(from_row(row), self.store, place) for row in asked.get("runs", [])
            ]
            if "sweep" in asked:
                new.append(SweepMirror(Path(asked["sweep"]), self.store, place))
            with self._lock:
                self._new += new
        self.ended.set()


def follow(inbox: Inbox) -> list[str]:
    """Tell until nothing is computed any more. Returns the names of what W&B has not, or not whole. Raises what stops
    W&B from working."""
    pending: list[Mirror | SweepMirror] = []
    over = False
    try:
        while True:
            for mirror in inbox.take():
                former = next((known for known in pending if known.id == mirror.id), None)
                if isinstance(former, Mirror):
                    former.advance(live=False)  # a shorter part of the same run, which has ended
                    former.close()
                    pending.remove(former)
                if not isinstance(former, SweepMirror):
                    pending.append(mirror)
            pending = [mirror for mirror in pending if not mirror.complete and not _advance(mirror)]
            if over:
                break
            over = inbox.ended.wait(POLL)
    finally:
        for mirror in pending:
            mirror.close()
    return [mirror.name for mirror in pending]


def _advance(mirror: Mirror | SweepMirror) -> bool:
    done = mirror.advance(live=mirror.place.mode == "online")
    if done:
        log.info("told: %s", mirror.name)
    return done


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    inbox = Inbox(Store(arguments[0]))
    os.nice(5)
    inbox.ended.wait(float(arguments[1]))
    try:
        left = follow(inbox)
    except Exception as error:
        log.exception("W&B cannot be told")
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        return 1
    if left:
        log.info("not computed, or not to their end: %s", ", ".join(left))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
