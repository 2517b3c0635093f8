"""A reward model as judge: transformers' sequence classification with one label; the higher reward wins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from src.data.rows import Prompt
from src.errors import ConfigError, StageError
from src.judges import Comparison, Judged, Verdict
from src.judges.answers import Answers
from src.model.loading import device_of
from src.planning.identity import ContentPath, EvaluateInputs, digest, locate
from src.planning.resources import Resources
from src.store.store import Store

if TYPE_CHECKING:
    from src.store.attempt import Attempt

BATCH = 16  # texts at once


def reward_model(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Rewards are kept by content: the baseline's are computed once for a whole grid."""
    judge = inputs.judge
    assert judge is not None and isinstance(judge.model, ContentPath)
    name = judge.model_name
    answers = Answers(Store(attempt.output_dir).answers("reward_model", name))
    model = judge.model.fingerprint
    texts = [(c.prompt, row["response"]) for c in comparisons for row in (c.response, c.baseline)]
    keys = [digest([model, prompt.messages, response]) for prompt, response in texts]
    answers.refresh()
    todo = {key: text for key, text in zip(keys, texts, strict=True) if key not in answers.known}
    if todo:
        finished = len(texts) - len(todo)
        for key, reward in _rewards(name, todo, resources.device):
            answers.add(key, {"reward": reward, "by": attempt.identity})
            finished += 1
            attempt.step(finished, len(texts))
    own = {key: answers.known[key] for key in keys}
    rewards = [own[key]["reward"] for key in keys]
    verdicts = [
        Verdict(0.5 if own == other else float(own > other), f"reward {own:.4g} against {other:.4g}")
        for own, other in zip(rewards[::2], rewards[1::2], strict=True)
    ]
    return Judged(verdicts, {"answers": len(texts), "calls": sum(a["by"] == attempt.identity for a in own.values())})


def _rewards(name: str, texts: dict[str, tuple[Prompt, str]], engine_device: str) -> Iterator[tuple[str, float]]:
    where = str(locate(name, "judge.model") or name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForSequenceClassification.from_pretrained(where, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"judge.model={name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if model.config.num_labels != 1:
        raise ConfigError(f"judge.model={name} has {model.config.num_labels} labels; a reward model has one")
    device = device_of(engine_device)
    model.to(device).eval()
    ids = {key: _ids(tokenizer, *text) for key, text in texts.items()}
    longest, limit = max(map(len, ids.values())), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StageError(f"judge.model={name} reads {limit} tokens; the longest prompt with its response has {longest}")
    order = sorted(ids, key=lambda key: len(ids[key]))
    for begin in range(0, len(order), BATCH):
        keys = order[begin : begin + BATCH]
        yield from zip(keys, _batch(model, tokenizer, [ids[key] for key in keys], device), strict=True)


def _ids(tokenizer: Any, prompt: Prompt, response: str) -> list[int]:
    """By the reward model's own chat template; without one, prompt and response apart by an empty line."""
    if tokenizer.chat_template:
        chat = [*prompt.messages, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{prompt.text}\n\n{response}")["input_ids"]


@torch.no_grad()
def _batch(model: Any, tokenizer: Any, rows: list[list[int]], device: torch.device) -> list[float]:
    # A decoder reads its reward at the last token that is not padding, so padding must be no row's last token.
    last = {row[-1] for row in rows}
    pad = tokenizer.pad_token_id
    if pad is None or pad in last:
        pad = next(i for i in range(len(last) + 1) if i not in last)
    model.config.pad_token_id = pad
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().tolist()
