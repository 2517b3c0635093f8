"""`python -m src.judges.math_answers SECONDS`: compares answers with expected ones, a line of JSON on stdin for each.

In a process of its own, because what a model writes may take sympy forever, or all memory, in code that no exception
ends: the kernel then ends the process, and the judge goes on with another. math-verify's own time limit is an alarm
signal, which works in the main thread alone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from src.data.boxes import last_box

MEMORY = 4 * 2**30  # bytes of address space
_BOX, _GSM8K_MARK = "\\boxed", "####"


def final_answer(response: str) -> str:
    """Return the part of a response with its answer: its last box, else what follows GSM8K's ####.

    Of a response with neither it is all of it, in which math-verify looks for the last expression.
    """
    if (answer := last_box(response)) is not None:
        return f"{_BOX}{{{answer}}}"
    _, mark, answer = response.rpartition(_GSM8K_MARK)
    return answer.strip().partition("\n")[0].rstrip() if mark else response


def compare(expected: str, response: str) -> tuple[bool, str | None]:
    """Return whether the response's answer equals the expected one, and the answer as written; None without one."""
    from math_verify import verify

    found = _parse(final_answer(response))
    text = next((str(item) for item in found if isinstance(item, str)), None)
    return bool(verify(_parse_expected(expected), found, timeout_seconds=None)), text


@lru_cache(maxsize=1024)
def _parse_expected(expected: str) -> list[Any]:
    return _parse(f"{_BOX}{{{expected}}}")


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # What is in a box comes before what follows words such as "the answer is".
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, targets, parsing_timeout=None)


def main(cpu_seconds: float) -> None:
    """Write `ready`, then for each line that is read, [expected, response], what `compare` returns.

    cpu_seconds: of one comparison; one that takes more ends the process.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not be among the answers
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    logging.disable(logging.WARNING)  # math-verify warns that it has no time limit of its own
    compare("1", "1")  # imports all that a comparison needs
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        print(json.dumps(compare(*json.loads(line))), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
