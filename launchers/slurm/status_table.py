"""What a person sees of a sweep on SLURM: what was submitted, and how it stands."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launchers.slurm.status import STATES, Picture, State, look
from launchers.slurm.submit import Submitted
from src.planning.plan import Plan
from src.progress import seconds_text

REFRESH_SECONDS = 2.0
LINE_SECONDS = 15.0  # between plain lines when nothing changes
ROWS = 30  # points of a sweep up to which each has a row; of larger ones what fails and runs
_STYLES = {"running": "green", "failed": "red", "cancelled": "yellow", "queued": "", "done": "dim", "to do": "dim"}


def announce(plan: Plan, folder: Path, submitted: Submitted) -> None:
    """Say what a submission did, and how to follow it."""
    done, where = sum(result in plan.done for result in plan.results), shlex.quote(str(folder))
    new = sum(len(s.tasks) for s in submitted.submissions if s.kind == "align")
    print(
        f"{folder.name}: {len(plan.points)} points: {done} done, {submitted.on_their_way} on their way,"
        f" {new} submitted now"
    )
    for submission in submitted.submissions:
        jobs = submission.jobs
        what = f"{len(jobs)} points" if submission.kind == "align" else submission.kind
        print(f"  job {jobs[0].partition('_')[0]:>8}  {what}")
    if submitted.removed:
        print(
            f"{len(submitted.removed)} jobs of points that are not in this sweep any more go on"
            f" ({_some(list(submitted.removed.values()))}); to end them:\n"
            f"  python -m sweeps.cancel {where} --removed"
        )
    if submitted.submissions or submitted.on_their_way:
        print(f"follow: python -m sweeps.status {where} --watch\ncancel: python -m sweeps.cancel {where}", flush=True)


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def watch(folder: Path, console: Console | None = None) -> Picture:
    """Show the sweep until all its jobs have ended: a table on a terminal, plain lines elsewhere.

    Ctrl-C leaves the jobs alone.
    """
    console = console or Console()
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    picture = look(folder, patience=0.0)
                    live.update(render(picture, folder), refresh=True)
                    if picture.ended:
                        break
                    time.sleep(REFRESH_SECONDS)
        else:
            told, before = 0.0, ""
            while True:
                picture = look(folder, patience=0.0)
                line = summary(picture)
                if line != before or time.monotonic() - told > LINE_SECONDS:
                    told, before = time.monotonic(), line
                    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
                if picture.ended:
                    break
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        print(f"\njobs go on; python -m sweeps.status {shlex.quote(str(folder))} --watch looks again")
        raise
    return look(folder)


def summary(picture: Picture) -> str:
    counts = Counter(point.state for point in picture.points)
    return f"{len(picture.points)} points: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])


def render(picture: Picture, folder: Path, everything: bool = False) -> Group:
    """The table of `sweeps.status`: what runs or failed one by one, what is alike counted."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("state", "point", "job", "progress", "left", "what"):
        table.add_column(name, overflow="fold", no_wrap=name != "what")
    for state in STATES:
        rows = [s for s in [*picture.shared, *picture.points] if s.state == state]
        alone = everything or len(picture.points) <= ROWS or state in ("failed", "running")
        shown = rows if alone else []
        for row in shown:
            table.add_row(*_cells(row))
        if len(rows) > len(shown):
            reasons = Counter(row.detail for row in rows if row.detail and state != "done")
            table.add_row(
                Text(state, style=_STYLES[state]),
                f"{len(rows)} points",
                "",
                "",
                "",
                _some([r for r, _ in reasons.most_common()]),
            )
    parts: list[Text | Table] = [Text(f"{folder.name}: {summary(picture)}", style="bold"), table]
    for log in dict.fromkeys(s.log for s in [*picture.shared, *picture.points] if s.state == "failed" and s.log):
        parts.append(Text(f"log: {log}", style="dim"))
    if picture.removed:
        parts.append(
            Text(f"{len(picture.removed)} more jobs are of points this sweep no longer has (cancel --removed)")
        )
    if (
        picture.aggregation
        and picture.ended is False
        and not any(p.state in ("running", "queued") for p in picture.points)
    ):
        parts.append(Text("all points have ended; the aggregation is on its way"))
    if picture.unconcluded:
        parts.append(Text(picture.unconcluded, style="red"))
    if picture.silent:
        parts.append(Text(picture.silent, style="yellow"))
    return Group(*parts)


def _cells(row: State) -> list[Text | str]:
    progress = f"{row.step}/{row.total}" if row.state == "running" and row.total else ""
    left = seconds_text(row.seconds_left) if row.state == "running" and row.seconds_left is not None else ""
    return [Text(row.state, style=_STYLES[row.state]), row.label, row.job or "", progress, left, row.detail]
