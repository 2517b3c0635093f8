"""Progress of one run on the console: a bar with ETA on a terminal, plain lines in a log or notebook."""

from __future__ import annotations

import time

from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

LINE_SECONDS = 5.0  # between plain lines


def seconds_text(seconds: float) -> str:
    """Return `42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class RunProgress:
    """`with RunProgress() as report:`, then call report(label, step, total) as stages advance."""

    def __init__(self, line_seconds: float = LINE_SECONDS) -> None:
        self.line_seconds = line_seconds
        self._bars = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> RunProgress:
        self._bars.disable = not self._bars.console.is_terminal
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def __call__(self, label: str, step: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(escape(label), total=total or None)
        self._bars.update(self._tasks[label], completed=step, total=total or None)
        now = time.monotonic()
        if self._bars.disable and (now - self._last_line >= self.line_seconds or (step == total and total)):
            self._last_line = now
            elapsed = self._bars.tasks[self._tasks[label]].elapsed or 0.0
            remaining = f", {seconds_text(elapsed / step * (total - step))} left" if 0 < step < total else ""
            print(f"{label}: {step}/{total}{remaining}", flush=True)
