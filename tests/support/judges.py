"""Questions to an endpoint as a judge asks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.config.endpoints import normalize_url
from src.config.judge import JudgeEndpoint
from src.judges.judge_client import JudgeClient
from src.planning.identity import JudgeInputs


class Attempt:
    """What judges use of an attempt."""

    identity = label = "here"

    def __init__(self, output_dir: Path | None = None) -> None:
        self.output_dir = output_dir

    def step(self, step: int, total: int) -> None:
        pass


def ask(endpoint: Any, output_dir: Path, model: str = "m", **options: Any) -> dict[str, Any]:
    """Ask the judge `model` of this endpoint one question, always the same, and return its answer."""
    options = {"timeout": 60.0, "max_retries": 0, "concurrency": 1, **options}
    judge = JudgeInputs("tldr", "sft", model, temperature=0.0, max_tokens=2, base_url=normalize_url(endpoint.url))
    client = JudgeClient(judge, JudgeEndpoint(endpoint.url, **options), output_dir)
    (answer,) = client.complete([[{"role": "user", "content": "Which?"}]], Attempt())
    return answer
