"""A tokenized training example."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A tokenized prompt and its responses: (chosen, rejected) of a pair, or a single one.

    Every response ends with its end-of-sequence token unless it was truncated, and has at least one token.
    unsupervised_spans: [start, end) token ranges of a multi-turn response that carry no loss (later user turns).
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    unsupervised_spans: tuple[tuple[int, int], ...] = ()
    source: str = field(default="", compare=False)  # the table of a mixture that it is of

    @property
    def num_supervised_tokens(self) -> int:
        """The number of tokens that carry loss."""
        return sum(map(len, self.responses)) - sum(end - start for start, end in self.unsupervised_spans)

    @property
    def length(self) -> int:
        """Tokens the model reads: the prompt once, each response without its last token, which predicts nothing."""
        return len(self.prompt) + sum(len(r) - 1 for r in self.responses)
