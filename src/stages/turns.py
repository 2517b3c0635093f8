"""The turns of conversations that are sampled: the prompt of each has the turns before it, with their responses."""

from __future__ import annotations

import logging
from typing import NamedTuple

from src.data.evaluation_prompts import next_turn
from src.data.rows import Prompt
from src.data.templates import Template
from src.planning.identity import GenerateInputs
from src.planning.resources import prompt_limit
from src.store.attempt import Attempt

log = logging.getLogger(__name__)


class Question(NamedTuple):
    number: int  # of the evaluation prompt
    sample: int
    turn: int  # from 1
    prompt: Prompt
    ids: list[int]  # of the prompt

    def temperature(self, inputs: GenerateInputs) -> float:
        """Return the temperature of responses to it: that of its category, where that has its own."""
        category = self.prompt.facts.get("category", "")
        return inputs.generation.temperatures.get(category, inputs.generation.temperature)


def next_question(
    inputs: GenerateInputs, template: Template, question: Question, response: list[int], attempt: Attempt
) -> Question:
    """Return the question of the next turn, cut to its last tokens where it is longer than turns may be."""
    prompt, turn = next_turn(question.prompt, template.text(response)), question.turn + 1
    ids = template.prompt_ids(prompt)
    limit = prompt_limit(inputs.prompts.data.max_prompt_tokens, inputs.generation.max_new_tokens, turn)
    if len(ids) > limit and attempt.is_main_process:
        log.warning("%s: turn %d of a prompt is cut to its last %d tokens", attempt.label, turn, limit)
    return question._replace(turn=turn, prompt=prompt, ids=ids[-limit:])
