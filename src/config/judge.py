"""The part of the schema that says what compares or grades responses, and how it is reached. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from src.config.fields import MAX_SECONDS, choice, number
from src.config.tables import MAX_ROWS, MAX_TOKENS

# name -> config fields that its verdicts depend on (part of the identity); src/judges/NAME.py has the function NAME
JUDGES: dict[str, tuple[str, ...]] = {
    "gold": (),
    "tldr": ("model", "temperature", "max_tokens"),
    "alpaca_eval": ("model", "difficulties"),
    "arena_hard": ("model", "temperature", "max_tokens", "prompt_file"),
    "arena_hard_v2": ("model", "temperature", "max_tokens", "prompt_file"),
    "mt_bench": ("model", "temperature", "max_tokens", "prompt_file", "references"),
    "mt_bench_pairwise": ("model", "temperature", "max_tokens", "prompt_file", "references"),
    "reward_model": ("model",),
    "math": (),
}


@dataclass
class JudgeEndpoint:
    """How to reach a judge's endpoint and what may be spent on it."""

    # Of an OpenAI-compatible endpoint; null: OpenAI's; server: one that the judging job starts by server.command.
    base_url: str | None = None
    # Variable with the key, which is never written down; null: OPENAI_API_KEY for OpenAI, no key for a base_url.
    api_key_env: str | None = None
    concurrency: int = number(8, minimum=1, maximum=2**16)
    timeout: float = number(60.0, above=0, maximum=MAX_SECONDS)
    max_retries: int = number(8, minimum=0, maximum=1000)
    server_timeout: float = number(900.0, above=0, maximum=MAX_SECONDS)  # until a server that the job starts is ready
    max_calls: int | None = number(None)
    max_cost: float | None = number(None)
    input_price: float | None = number(None)  # dollars per million tokens
    output_price: float | None = number(None)


@dataclass
class Judge(JudgeEndpoint):
    name: str = choice("none", *JUDGES)
    baseline: str | None = "sft"  # sft | chosen | a file of answers: what a response is compared with
    model: str | None = None  # as the endpoint calls it; of alpaca_eval: an annotator; of reward_model: a model
    difficulties: str | None = None  # of alpaca_eval: its table df_gamed.csv; null: the hub's
    # Which points are judged on the reporting prompts: all, or those that the selection prompts have selected.
    reporting: str = choice("all", "selected", default="all")
    prompt_file: str | None = None  # the judge's prompt in its benchmark's format
    references: str | None = None  # a file of reference answers, in MT-Bench's format
    temperature: float = number(0.0, maximum=100)
    max_tokens: int = number(256, minimum=1, maximum=MAX_TOKENS)  # of an answer
    repeated_prompts: int = number(0, maximum=MAX_ROWS)  # whose questions are asked a second time, to see the noise
