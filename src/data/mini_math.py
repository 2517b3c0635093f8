"""mini math: generated sums in words, answers worked out with mistakes, and pairs of a right and a wrong one.

`python -m src.data.mini_math` prints a few. docs/mini_math.md describes the task and measurements on it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

# In words that the tokenizer of mini TL;DR has.
PEOPLE = ("my brother", "my sister", "my boss", "my cousin", "my roommate", "my uncle", "my neighbor", "my client")
THINGS = ("dollars", "keys", "bikes", "laptops", "cars", "guitars")
GAINS, LOSSES = ("got", "borrowed"), ("lost", "sold")
LARGEST = 9  # of any number in a problem and in its right solution; mistakes may lead beyond
SKILLS = (0.5, 0.7, 0.95)  # of those who work a problem out: the probability that a step is right
MISTAKES = (-2, -1, 1, 2)


@dataclass(frozen=True)
class Problem:
    text: str
    start: int
    changes: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


def make_problem(rng: random.Random, held_out: bool = False) -> Problem:
    """Return a problem of two steps, whose numbers are all in [0, LARGEST]. One in eight texts is only held out."""
    while True:
        problem = _draw_problem(rng)
        if (zlib.crc32(problem.text.encode()) % 8 == 0) == held_out:
            return problem


def _draw_problem(rng: random.Random) -> Problem:
    value = start = rng.randint(1, LARGEST)
    changes: list[int] = []
    for _ in range(2):
        is_gain = value == 0 or (value < LARGEST and rng.random() < 0.5)
        change = rng.randint(1, LARGEST - value) if is_gain else -rng.randint(1, value)
        changes.append(change)
        value += change
    events = [f"{rng.choice(GAINS if change > 0 else LOSSES)} {abs(change)}" for change in changes]
    person, things = rng.choice(PEOPLE), rng.choice(THINGS)
    text = f"{person} had {start} {things} , {events[0]} , then {events[1]} . how many now ?"
    return Problem(text, start, tuple(changes))


def solve(rng: random.Random, problem: Problem, skill: float | None = None) -> str:
    """Return a worked answer; skill: the probability that a step is right, by default that of a random person.

    After a mistake the work goes on with the wrong number. Nobody writes one beyond [0, LARGEST].
    """
    probability = rng.choice(SKILLS) if skill is None else skill
    value, lines = problem.start, []
    for change in problem.changes:
        result = value + change
        if rng.random() >= probability:
            result += rng.choice(MISTAKES)
        result = min(max(0, result), LARGEST)
        lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {result}")
        value = result
    return f"{' , '.join(lines)} . \\boxed{{{value}}}"


def is_right(problem: Problem, response: str) -> bool:
    """Return whether a worked answer ends with the right number in its box; how it got there does not count."""
    return response.endswith(f"\\boxed{{{problem.answer}}}")


def demonstrations(
    count: int, seed: int, skill: float | None = None, held_out: bool = False
) -> list[tuple[Problem, str]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        problem = make_problem(rng, held_out)
        rows.append((problem, solve(rng, problem, skill)))
    return rows


def preferences(count: int, seed: int, held_out: bool = False) -> list[tuple[Problem, str, str]]:
    """Return (problem, a right answer, a wrong one), each worked out by a random person who comes to such a result."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        problem = make_problem(rng, held_out)
        answers: dict[bool, str] = {}
        while len(answers) < 2:
            answer = solve(rng, problem)
            answers.setdefault(is_right(problem, answer), answer)
        rows.append((problem, answers[True], answers[False]))
    return rows


def problems(count: int, seed: int) -> list[Problem]:
    """Return held-out problems."""
    rng = random.Random(seed)
    return [make_problem(rng, held_out=True) for _ in range(count)]


if __name__ == "__main__":
    for problem, right, wrong in preferences(4, seed=0):
        print(f"{problem.text}\n  chosen   {right}\n  rejected {wrong}\n")
