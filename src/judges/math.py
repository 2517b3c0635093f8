"""Answers to mathematical problems, compared with the expected ones by the package math-verify."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import StageError
from src.hardware import cores
from src.judges import Comparison, Judged, Response, Verdict
from src.planning.identity import EvaluateInputs, JudgeInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

log = logging.getLogger(__name__)

MODULE = "src.judges.math_answers"
ROOT = Path(__file__).resolve().parents[2]
PER_PROCESS = 256  # comparisons for which another process is worth its start
MAX_PROCESSES = 16
CPU_SECONDS = 5.0  # of a comparison; of processor time, so that a busy machine gives the same verdicts
_MAX_TEXT = 80  # characters of an answer in a reason


class Question(NamedTuple):
    expected: str
    response: str


class Checked(NamedTuple):
    """Whether an answer is right; the answer as written, None without one; None for `is_right`: it cannot be told."""

    is_right: bool | None
    answer: str | None


def math(inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt) -> Judged:
    """Return 1 for a right answer, 0 for a wrong one, for none, and for one that takes too long to compare.

    Nothing is kept of an interrupted evaluation: thousands of answers take a minute.
    """
    questions = [Question(c.prompt.facts["answer"], c.response["response"]) for c in comparisons]
    results = _check_all(questions, resources, attempt)
    without = sum(result.answer is None for result in results)
    verdicts = [_verdict(question, result) for question, result in zip(questions, results, strict=True)]
    return Judged(verdicts, {"answers": len(results), "calls": len(results), "unparsable": without})


def grades(judge: JudgeInputs, resources: Resources, responses: Sequence[Response], attempt: Attempt) -> list[float]:
    """Return 1 for a right answer, 0 for all others."""
    questions = [Question(r.prompt.facts["answer"], r.text) for r in responses]
    return [float(result.is_right or False) for result in _check_all(questions, resources, attempt)]


def _check_all(questions: Sequence[Question], resources: Resources, attempt: Attempt) -> list[Checked]:
    """Return the result of each question; equal ones are asked once."""
    distinct = list(dict.fromkeys(questions))
    checked: dict[Question, Checked] = {}
    with closing(check_answers(distinct, resources.cpu_threads)) as answers:
        for question, result in zip(distinct, answers, strict=True):
            checked[question] = result
            attempt.step(len(checked), len(distinct) + 1)
    results = [checked[question] for question in questions]
    if undecided := sum(result.is_right is None for result in results):
        log.warning("%s: %d of %d answers could not be compared: wrong", attempt.label, undecided, len(results))
    return results


def _verdict(question: Question, result: Checked) -> Verdict:
    expected = f"expected {_shortened(question.expected)}"
    if result.is_right is None:
        return Verdict(0.0, f"the answer could not be compared; {expected}")
    answer = "no answer" if result.answer is None else f"answer {_shortened(result.answer)}"
    return Verdict(float(result.is_right), f"{answer}, {expected}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def check_answers(questions: Sequence[Question], max_processes: int | None = None) -> Generator[Checked]:
    """Yield the result of each question, in order. max_processes: None for as many as the machine has cores.

    Raises StageError when the program that compares answers does not start.
    """
    most = min(MAX_PROCESSES, max_processes or cores())
    count = max(1, min(most, len(questions) // PER_PROCESS))
    with ExitStack() as cleanup:
        free: queue.SimpleQueue[_Checker] = queue.SimpleQueue()
        for _ in range(count):
            free.put(cleanup.enter_context(_Checker()))

        def check(question: Question) -> Checked:
            checker = free.get()
            try:
                return checker.check(question)
            finally:
                free.put(checker)

        threads = ThreadPoolExecutor(count)
        cleanup.callback(threads.shutdown, cancel_futures=True)
        yield from threads.map(check, questions)


class _Checker:
    """A process of `src.judges.math_answers`; one that ended over a question is replaced for the next."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def check(self, question: Question) -> Checked:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = _read(process)
        except OSError:
            answer = None
        if answer is None:
            self._stop()
            return Checked(None, None)
        return Checked(*answer)

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the other
        )
        if _read(process) != "ready":
            self._stop()
            raise StageError(f"judge=math: the program that compares answers does not start; try python -m {MODULE} 5")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(OSError), self._process:  # which closes the pipes; what was not written cannot be
                pass
            self._process = None


def _read(process: subprocess.Popen[str]) -> Any:
    """Return the next line of JSON; None when the process has ended, perhaps within a line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None
