"""Progress of a local sweep: a live table on a terminal, plain lines in a log or notebook."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launchers.job_order import Schedule
from launchers.worker_group import WorkerGroup
from src.planning.stage import Stage
from src.progress import seconds_text
from src.store.store import SHARED_ROLES, Store, read_result

LINE_SECONDS = 15.0  # between plain lines while nothing finishes


def metrics_text(artifacts: Path) -> str:
    """Return the quality and the KL of a finished `evaluate` stage, those that it has."""
    result = read_result(artifacts)
    quality, kl = result["quality"], result["kl"]["per_sequence"]
    texts = [] if quality["value"] is None else [f"{quality['metric']} {quality['value']:.3f}"]
    texts += [] if kl["value"] is None else [f"KL {kl['value']:.2f}"]
    return ", ".join(texts)


class LiveTable:
    """Shows what the workers are computing, and a line for each shared stage, point or failure that finished."""

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        store: Store,
        workers: list[WorkerGroup],
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self.line_seconds = line_seconds
        self.name, self.schedule, self.store, self.workers = name, schedule, store, workers
        self.live = Live(console=Console(markup=False, emoji=False), auto_refresh=False, transient=True)
        self.is_terminal = self.live.console.is_terminal
        self.started = self._last_line = time.monotonic()

    def __enter__(self) -> LiveTable:
        if self.is_terminal:
            self.live.start()
        else:
            counts, num_stages = self.schedule.point_counts(), len(self.schedule.waiting)
            text = f"{self.name}: {sum(counts)} points ({counts[0]} already done), {num_stages} stages to run"
            print(text, flush=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def update(self, finished: list[tuple[Stage, str | None]]) -> None:
        """Print a line for every stage that failed (why) or is done (None) and is shared or the last of its point.

        Then show what is running now.
        """
        for stage, error in finished:
            if error is not None:
                self._print(f"FAILED {stage.label}: {error}")
            elif stage.role in SHARED_ROLES:
                self._print(f"done   {stage.label} in {seconds_text(self.schedule.completed[stage.identity])}")
            elif stage.kind == "evaluate":
                self._print(f"done   {stage.point.label}: {metrics_text(self.store.dir(stage))}")
        if self.is_terminal:
            self.live.update(self._table(), refresh=True)
        elif time.monotonic() - self._last_line > self.line_seconds:
            running = [worker.stage for worker in self.workers if worker.stage is not None]
            self._print(", ".join(f"{stage.label} {self._fraction(stage):.0%}" for stage in running))

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self.is_terminal:
            self.live.console.print(Text(text, style="red" if text.startswith("FAILED") else ""))
        else:
            print(f"[{self._summary()}] {text}", flush=True)

    def _summary(self) -> str:
        done, running, failed, waiting = self.schedule.point_counts()
        parts = [f"{done}/{done + running + failed + waiting} points", f"{running} running"]
        if failed:
            parts.append(f"{failed} failed")
        fractions = {identity: self._fraction(stage) for identity, stage in self.schedule.running.items()}
        seconds_left = self.schedule.seconds_left(len(self.workers), fractions)
        parts.append(seconds_text(time.monotonic() - self.started))
        if seconds_left is not None:
            parts.append(f"{seconds_text(seconds_left)} left")
        return ", ".join(parts)

    def _fraction(self, stage: Stage) -> float:
        progress = self.store.progress(stage)
        return progress["step"] / progress["total"] if progress and progress["total"] else 0.0

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for worker in self.workers:
            if worker.stage is None:
                table.add_row(Text("idle", style="dim"))
                continue
            progress = self.store.progress(worker.stage) or {"step": 0, "total": 0}
            bar = ProgressBar(total=progress["total"] or 1, completed=progress["step"], width=30)
            table.add_row(worker.stage.label, bar, f"{progress['step']}/{progress['total']}")
        return Group(Text(f"{self.name}: {self._summary()}", style="bold"), table)
