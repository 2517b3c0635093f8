"""Random preference pairs with the lengths of real ones."""

from __future__ import annotations

import random

from src.data.examples import Example

# Median prompt and response tokens. Sequences have 416 and 409 tokens; prompt : response is 11 : 1 and 0.42 : 1.
SHAPES = {"tldr": (381, 35), "ultrafeedback": (121, 288)}
SPREAD = 0.3  # sigma of the log-normal distribution of lengths
VOCABULARY = 49152


def make_pairs(shape: str, count: int, scale: float = 1.0, draw: int = 0) -> list[Example]:
    rng = random.Random(draw)

    def tokens(median: float) -> tuple[int, ...]:
        length = max(2, round(scale * median * rng.lognormvariate(0, SPREAD)))
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(length))

    prompt, response = SHAPES[shape]
    return [Example(tokens(prompt), (tokens(response), tokens(response))) for _ in range(count)]
