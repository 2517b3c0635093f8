"""Command line: `python -m tests.fuzz --seed N --cases M [--only KIND] [--case KIND:NUMBER] [--jobs J]`."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed

from tests.fuzz import damage, overrides, rows
from tests.fuzz.sandbox import Sandbox, preload

KINDS: dict[str, Any] = {"overrides": overrides, "rows": rows, "damage": damage}
SHARES = {"overrides": 3, "rows": 1, "damage": 1}  # of the cases
MOST_TRIES = 12  # to make a violation smaller


@dataclass(frozen=True)
class Case:
    kind: str
    number: int
    content: Any

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.number}"


@dataclass
class Outcome:
    case: Case
    broken: list[str]
    commands: list[str]
    codes: list[int | None]
    messages: list[str]
    seconds: float = 0.0
    smallest: Any = None  # content with which something still breaks


def draw(kind: str, seed: int, number: int) -> Case:
    """Return a case of a seed, drawn by Hypothesis: the same whatever other cases are drawn."""
    drawn: list[Any] = []

    @hypothesis_seed(f"{seed} {kind} {number}")
    @settings(
        max_examples=2,  # the first one is always the simplest there is
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind].cases())
    def collect(content: Any) -> None:
        drawn.append(content)

    collect()
    return Case(kind, number, drawn[-1])


def select(seed: int, count: int, only: str | None) -> list[Case]:
    """Return the cases of a seed, the kinds in turn."""
    kinds = [only] if only else list(SHARES)
    total = sum(SHARES[kind] for kind in kinds)
    cases = [draw(kind, seed, number) for kind in kinds for number in range(-(-count * SHARES[kind] // total))]
    return sorted(cases, key=lambda case: ((case.number + 0.5) / SHARES[case.kind], case.kind))[:count]


def run_case(case: Case, folder: Path, bases: Any, shrink: bool) -> Outcome:
    started = time.monotonic()
    sandbox = Sandbox(folder)
    broken = KINDS[case.kind].check(case.content, sandbox, bases)
    outcome = Outcome(case, broken, sandbox.commands, sandbox.codes, sandbox.messages)
    if broken and shrink:
        outcome.smallest = case.content
        tries, progress = 0, True
        while progress and tries < MOST_TRIES:
            progress = False
            for candidate in KINDS[case.kind].smaller(outcome.smallest):
                tries += 1
                trial = Sandbox(folder.with_name(f"{folder.name}-{tries}"))
                still = KINDS[case.kind].check(candidate, trial, bases)
                shutil.rmtree(trial.root, ignore_errors=True)
                if still:
                    outcome.smallest, progress = candidate, True
                    break
                if tries >= MOST_TRIES:
                    break
    outcome.seconds = time.monotonic() - started
    return outcome


def run_all(cases: list[Case], session: Path, bases: dict[str, Any], jobs: int, shrink: bool) -> Iterator[Outcome]:
    """Run each case in a fork of this process, `jobs` at once, and yield what they found."""
    waiting, running = list(reversed(cases)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            folder = session / case.name.replace(":", "-")
            pid = os.fork()
            if pid == 0:
                try:
                    try:
                        outcome = run_case(case, folder, bases.get(case.kind), shrink)
                    except Exception:
                        outcome = Outcome(case, [f"the suite itself failed: {traceback.format_exc()}"], [], [], [])
                    folder.with_suffix(".outcome").write_bytes(pickle.dumps(outcome))
                finally:
                    os._exit(0)
            running[pid] = folder
        pid, _ = os.waitpid(-1, 0)
        if pid in running:
            folder = running.pop(pid)
            outcome = pickle.loads(folder.with_suffix(".outcome").read_bytes())
            if not outcome.broken:
                shutil.rmtree(folder, ignore_errors=True)
            yield outcome


def report(outcome: Outcome, seed: int, session: Path) -> str:
    """Return what broke and how to see it again."""
    case = outcome.case
    lines = [f"VIOLATION {case.name}", *(f"  {broken}" for broken in outcome.broken)]
    lines += [f"    ran: {command[:1500]}" for command in outcome.commands]
    if outcome.smallest is not None and outcome.smallest != case.content:
        lines.append(f"  smallest: {outcome.smallest!r}"[:1500])
    lines.append(f"  again: python -m tests.fuzz --seed {seed} --case {case.name}")
    lines.append(f"  files: {session / case.name.replace(':', '-')}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--case", help="run this one alone, e.g. damage:12")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases that run at once")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument(
        "--verbose", action="store_true", help="print every case with the last line of its first command"
    )
    parser.add_argument("--show", action="store_true", help="print the cases without running them")
    options = parser.parse_args()
    if options.case:
        kind, _, number = options.case.partition(":")
        if kind not in KINDS or not number.isdigit():
            parser.error("--case is KIND:NUMBER, such as damage:12")
        cases = [draw(kind, options.seed, int(number))]
    else:
        cases = select(options.seed, options.cases, options.only)
    if options.show:
        for case in cases:
            print(case.name, case.content)
        return 0
    session = (options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))).absolute()
    session.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MPLCONFIGDIR": str(session / "matplotlib"), "HF_HOME": str(session / "hub")}
    preload()
    started = time.monotonic()
    bases = {kind: KINDS[kind].prepare(session) for kind in {case.kind for case in cases}}
    violations: list[str] = []
    count, seconds, last = Counter[str](), Counter[str](), time.monotonic()
    codes: dict[str, Counter[int | None]] = {kind: Counter() for kind in KINDS}
    for number, outcome in enumerate(run_all(cases, session, bases, options.jobs, shrink=True), start=1):
        count[outcome.case.kind] += 1
        seconds[outcome.case.kind] += outcome.seconds
        codes[outcome.case.kind].update(outcome.codes[:1])
        if options.verbose:
            print(outcome.case.name, outcome.codes, *outcome.messages[:1], flush=True)
        if outcome.broken:
            violations.append(report(outcome, options.seed, session))
            print(violations[-1], flush=True)
        if time.monotonic() - last > 10 or number == len(cases):
            last, elapsed = time.monotonic(), time.monotonic() - started
            left = elapsed / number * (len(cases) - number)
            print(f"{number} of {len(cases)} cases, {len(violations)} violations, {left:.0f} s left", flush=True)
    for kind in (kind for kind in KINDS if count[kind]):
        ended = ", ".join(f"{number} with {code}" for code, number in sorted(codes[kind].items(), key=str))
        print(f"{count[kind]} {kind}, {seconds[kind] / count[kind]:.2f} s each; ended {ended}")
    print(f"seed {options.seed}: {len(cases)} cases, {len(violations)} violations, {time.monotonic() - started:.0f} s")
    if not violations and not options.folder:
        shutil.rmtree(session, ignore_errors=True)
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
