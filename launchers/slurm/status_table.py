"""The output about a sweep on SLURM: what was submitted, and the table of its points."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launchers.slurm.job_records import Submission, Task
from launchers.slurm.point_status import STATES, PointStatus
from launchers.slurm.status import SweepStatus, read_status
from launchers.slurm.submit import Submitted
from src.planning.plan import Plan
from src.progress import seconds_text
from src.store.sweep_folder import SweepFolder
from src.store.usage import Usage

REFRESH_SECONDS = 2.0
LINE_SECONDS = 15.0  # between plain lines while nothing changes
MAX_ROWS = 30  # a sweep of more points gets rows for failed and running points only
_STYLES = {"running": "green", "failed": "red", "cancelled": "yellow", "queued": "", "done": "dim", "to do": "dim"}


def announce(plan: Plan, folder: SweepFolder, submitted: Submitted) -> None:
    """Print what was submitted, and the commands to follow and to cancel it."""
    num_done, path = sum(result in plan.done for result in plan.results), shlex.quote(str(folder.path))
    num_submitted = sum(_evaluates(task) for submission in submitted.submissions for task in submission.tasks)
    print(
        f"{folder.name}: {len(plan.points)} points: {num_done} done, {submitted.in_flight} in progress,"
        f" {num_submitted} submitted"
    )
    for submission in submitted.submissions:
        print(f"  job {submission.jobs[0].partition('_')[0]:>8}  {_content(submission)}")
    if submitted.submissions or submitted.in_flight:
        print(f"follow: python -m sweeps.status {path} --watch\ncancel: python -m sweeps.cancel {path}", flush=True)


def _content(submission: Submission) -> str:
    """Return what the jobs of a submission compute."""
    if submission.kind not in ("align", "sample"):
        return submission.kind
    num_jobs, num_points = len(submission.jobs), len(submission.tasks)
    part = ": sampling" if submission.kind == "sample" else "" if _evaluates(submission.tasks[0]) else ": alignment"
    return f"{num_points} points{part}" + (f" in {num_jobs} jobs" if submission.tasks[0].shares_job else "")


def _evaluates(task: Task) -> bool:
    """Return whether the task is submitted for the result of a point."""
    return any(kind == "evaluate" for kind, _ in task.stages)


def _first_three(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def watch(folder: SweepFolder, console: Console | None = None) -> SweepStatus:
    """Show the sweep until all its jobs have ended: a table on a terminal, plain lines elsewhere.

    Ctrl-C leaves the jobs running.
    """
    console = console or Console(markup=False, emoji=False)
    live = Live(console=console, auto_refresh=False)
    last_printed, last_line = 0.0, ""
    try:
        with live if console.is_terminal else contextlib.nullcontext():
            while True:
                status = read_status(folder, sacct_timeout=0.0)
                line = summary(status)
                if console.is_terminal:
                    live.update(render(status, folder), refresh=True)
                elif line != last_line or time.monotonic() - last_printed > LINE_SECONDS:
                    last_printed, last_line = time.monotonic(), line
                    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
                if status.ended:
                    return read_status(folder)
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        path = shlex.quote(str(folder.path))
        print(f"\nJobs keep running. Reattach with: python -m sweeps.status {path} --watch")
        raise


def summary(status: SweepStatus) -> str:
    counts = Counter(point.state for point in status.points)
    return f"{len(status.points)} points: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])


def render(status: SweepStatus, folder: SweepFolder, show_all: bool = False) -> Group:
    """Return the table of `sweeps.status`: rows for running and failed points, other points of large sweeps counted."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("state", "point", "job", "progress", "left", "detail"):
        table.add_column(name, overflow="fold", no_wrap=name != "detail")
    rows = [*status.shared_stages, *status.points]
    for state in STATES:
        in_state = [row for row in rows if row.state == state]
        if show_all or len(status.points) <= MAX_ROWS or state in ("failed", "running"):
            for row in in_state:
                table.add_row(*_cells(row))
        elif in_state:
            reasons = Counter(row.detail for row in in_state if row.detail and state != "done")
            details = _first_three([reason for reason, _ in reasons.most_common()])
            table.add_row(Text(state, style=_STYLES[state]), f"{len(in_state)} points", "", "", "", details)
    parts: list[Text | Table] = [Text(f"{folder.name}: {summary(status)}", style="bold"), table]
    if status.usage:
        kinds = ", ".join(f"{kind} {usage.text}" for kind, usage in status.usage.items())
        total = sum(status.usage.values(), Usage())
        parts.append(Text(f"accelerator-hours of finished stages: {total.text} ({kinds})", style="dim"))
    for log in dict.fromkeys(row.log for row in rows if row.state == "failed" and row.log):
        parts.append(Text(f"log: {log}", style="dim"))
    if status.aggregation and not status.has_active_points:
        parts.append(Text("all points have ended; the aggregation is in progress"))
    parts += [Text(error, style="red") for error in (status.aggregation_error, status.slurm_error) if error]
    return Group(*parts)


def _cells(row: PointStatus) -> list[Text | str]:
    progress = f"{row.step}/{row.total}" if row.state == "running" and row.total else ""
    time_left = seconds_text(row.seconds_left) if row.state == "running" and row.seconds_left is not None else ""
    return [Text(row.state, style=_STYLES[row.state]), row.label, row.job or "", progress, time_left, row.detail]
