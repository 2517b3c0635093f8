"""A model as lm-eval asks it, shared by all ranks of a run; what it has answered is kept for a later attempt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig

from src.data.rows import Prompt
from src.data.templates import Template
from src.distributed import get_distributed
from src.errors import StageError, describe_failure
from src.hardware import release_accelerator
from src.model.loading import device_of, load_weights, numerics_of
from src.model.numerics import cast_for_inference_
from src.planning.content import digest
from src.planning.identity import CapabilityInputs, GenerationInputs
from src.planning.resources import Resources
from src.serving.model_server import REQUEST_TIMEOUT, served_folder, serving
from src.stages.generate import whole_model
from src.stages.shared_rows import SharedRows
from src.store.attempt import Attempt

CHUNK = 64  # requests that are answered, and kept, together; fixed, as the composition of batches decides rounding
MAX_NEW_TOKENS = 256  # of an answer, where a task does not say; lm-eval's own


class SharedModel(LM):
    """Every rank makes one of the same model; lm-eval asks each everything, and each answers a share of the chunks."""

    def __init__(self, model: Any, template: Template, attempt: Attempt) -> None:
        super().__init__()
        self._model, self._template, self._attempt = model, template, attempt
        self.task = ""  # whose requests come next, for progress and messages

    @property
    def tokenizer_name(self) -> str:
        return ""  # lm-eval names caches of requests by it, which are off

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(logp, is_greedy) for logp, is_greedy in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answers("generate_until", requests)

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model was trained on it, up to the start of the next answer.

        add_generation_prompt: False where the last message is the beginning of that answer.
        """
        messages = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        return self._template.prompt_text(Prompt(tuple(messages))) + begun

    def _answers(self, kind: str, requests: list[Instance]) -> list[Any]:
        """Return the answers to all requests, on every rank. Raises StageError when the model cannot answer."""
        # Another question than in an earlier attempt, as of data that has changed on the hub, has another answer.
        name = f"{kind}-{digest([repr(request.args) for request in requests])}"
        rows = SharedRows(self._attempt, name, self._attempt.part(self.task, len(requests)))
        starts = range(0, len(requests), CHUNK)
        for chunk in rows.share.of(range(start, min(start + CHUNK, len(requests))) for start in starts):
            torch.manual_seed(chunk.start)  # of a task that samples
            try:
                answers = getattr(self._model, kind)([requests[i] for i in chunk], disable_tqdm=True)
            except Exception as error:  # of lm-eval, of the model, or of a server
                raise StageError(f"{self._attempt.label}: {self.task}: {describe_failure(error)}") from error
            answered = zip(chunk, answers, strict=True)
            rows.save({i: {"answer": a, "tokens": self._count(requests[i], a)} for i, a in answered})
        gathered = rows.gather()
        self._attempt.tokens += sum(row["tokens"] for row in gathered.values())
        return [gathered[i]["answer"] for i in range(len(requests))]

    def _count(self, request: Instance, answer: Any) -> int:
        """Return the tokens of a question with its answer."""
        text = "".join(part for part in (*request.args, answer) if isinstance(part, str))
        return len(self._template.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextlib.contextmanager
def shared_model(
    inputs: CapabilityInputs, resources: Resources, upstream: dict[str, Path], template: Template, attempt: Attempt
) -> Iterator[SharedModel]:
    """Load the checkpoint, or start a server of it, and yield the model."""
    release_accelerator()  # of what earlier stages of this process held
    with contextlib.ExitStack() as cleanup:
        if inputs.server is None:
            yield SharedModel(_loaded(inputs, resources, upstream, template), template, attempt)
        else:
            served = _served(inputs, inputs.server, resources, upstream, template, attempt, cleanup)
            yield SharedModel(served, template, attempt)


def _loaded(inputs: CapabilityInputs, resources: Resources, upstream: dict[str, Path], template: Template) -> Any:
    weights = load_weights(inputs.model, resources, upstream["checkpoint"], upstream.get("reference"))
    model = cast_for_inference_(weights, numerics_of(inputs.model, resources)).to(device_of(resources.device))
    model.generation_config.eos_token_id = [*template.end_ids]
    return HFLM(
        pretrained=model,
        tokenizer=template.tokenizer,
        add_bos_token=_adds_begin(inputs, template),
        batch_size=resources.capability_batch_size,
    )


def _adds_begin(inputs: CapabilityInputs, template: Template) -> bool:
    """Return whether lm-eval adds a begin token: not where the template writes it, else where the tokenizer does."""
    tokenizer = template.tokenizer
    return not inputs.chat_template and tokenizer.encode("a") != tokenizer.encode("a", add_special_tokens=False)


def _served(
    inputs: CapabilityInputs,
    server: tuple[str, str],
    resources: Resources,
    upstream: dict[str, Path],
    template: Template,
    attempt: Attempt,
    cleanup: contextlib.ExitStack,
) -> Any:
    """Start a server of this rank's own, on its accelerator, for the time of `cleanup`."""
    checkpoint = whole_model(inputs, resources, upstream, template, attempt)
    own_folder = attempt.checkpoints / f"server-{get_distributed().rank}"
    own_folder.mkdir(exist_ok=True)
    folder = served_folder(checkpoint, own_folder, template, GenerationInputs(0.0, 0, 1.0, MAX_NEW_TOKENS, 0, server))
    release_accelerator()  # a server allocates the memory that is free when it starts
    timeout, precision = resources.server_timeout, inputs.model.precision
    url = cleanup.enter_context(serving(server[1], timeout, folder, precision, own_folder, lambda: None))
    return LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model=str(folder),
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        add_bos_token=_adds_begin(inputs, template),
        num_concurrent=max(2, resources.server_concurrency),  # with 1 it would go through a proxy
        max_length=resolve_max_length(AutoConfig.from_pretrained(folder), template.tokenizer, default=2048),
        timeout=REQUEST_TIMEOUT,
        header={"Accept": "application/json"},  # else it sends OpenAI's key
    )
