"""A reward model as judge: a transformers sequence classifier with one label. The higher reward wins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from src.data.control_tokens import ControlTokens
from src.data.rows import Prompt
from src.errors import ConfigError, StageError
from src.judges import Comparison, Judged, Verdict
from src.judges.answers import Answers, is_number, is_text
from src.model.loading import copy_weights_, device_of, load_pretrained, load_tokenizer
from src.planning.content import ContentPath, digest, locate, reading
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

BATCH_SIZE = 16  # texts


def reward_model(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Compare the rewards of response and baseline; equal ones are a tie.

    Rewards are kept by content: those of the baseline are computed once for a whole sweep.
    """
    judge = inputs.judge
    assert judge is not None and isinstance(judge.model, ContentPath)
    answers = Answers.of_judge(judge, attempt.output_dir, {"reward": is_number, "by": is_text})
    texts = [(c.prompt, row["response"]) for c in comparisons for row in (c.response, c.baseline)]
    keys = [digest([judge.model.fingerprint, prompt.messages, response]) for prompt, response in texts]
    answers.refresh()
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in answers.known}
    if missing:
        for key, reward in _rewards(judge.model, missing, resources.device):
            if not math.isfinite(reward):
                raise StageError(
                    f"judge.model={judge.model_name}: the reward of a response is {reward}; use another model"
                )
            answers.add(key, {"reward": reward, "by": attempt.identity})
            attempt.step(sum(key in answers.known for key in keys), len(keys))
    rewards = [answers.known[key]["reward"] for key in keys]
    verdicts = [_compare(*both) for both in zip(rewards[::2], rewards[1::2], strict=True)]
    calls = sum(answers.known[key]["by"] == attempt.identity for key in set(keys))
    return Judged(verdicts, {"answers": len(keys), "calls": calls})


def _compare(response: float, baseline: float) -> Verdict:
    value = 0.5 if response == baseline else float(response > baseline)
    return Verdict(value, f"reward {response:.4g} against {baseline:.4g}")


def _rewards(path: ContentPath, texts: dict[str, tuple[Prompt, str]], device: str) -> Iterator[tuple[str, float]]:
    """Yield (key, reward) of every text, in batches of similar length."""
    name = path.location
    source = str(locate(name, "judge.model") or name)
    with reading(path):
        tokenizer = load_tokenizer(source, f"judge.model={name}")
        model = load_pretrained(AutoModelForSequenceClassification, source, f"judge.model={name}")
        copy_weights_(model)
    if model.config.num_labels != 1:
        raise ConfigError(f"judge.model={name} has {model.config.num_labels} labels; a reward model has one")
    model.to(device_of(device)).eval()
    apply = partial(tokenizer.apply_chat_template, tokenize=False) if tokenizer.chat_template else None
    control = ControlTokens(tokenizer, apply)
    ids = {key: _tokenize(tokenizer, control, *text) for key, text in texts.items()}
    longest, limit = max(map(len, ids.values())), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StageError(f"judge.model={name} reads {limit} tokens; the longest prompt with its response has {longest}")
    order = sorted(ids, key=lambda key: len(ids[key]))
    for start in range(0, len(order), BATCH_SIZE):
        keys = order[start : start + BATCH_SIZE]
        yield from zip(keys, _batch_rewards(model, tokenizer, [ids[key] for key in keys]), strict=True)


def _tokenize(tokenizer: Any, control: ControlTokens, prompt: Prompt, response: str) -> list[int]:
    """Return the ids of the reward model's chat template; without one, an empty line separates prompt and response.

    Texts that spell a control token stay text: an answer cannot end its turn and go on as the user.
    """
    if tokenizer.chat_template:
        chat = [*prompt.messages, {"role": "assistant", "content": response}]
        marked = [{**message, "content": control.mark(message["content"])} for message in chat]
        return control.encode(tokenizer.apply_chat_template(marked, tokenize=False))
    text = f"{prompt.text}\n\n{response}"
    return tokenizer(text, split_special_tokens=control.are_in(text))["input_ids"]


@torch.no_grad()
def _batch_rewards(model: Any, tokenizer: Any, rows: list[list[int]]) -> list[float]:
    # A decoder reads its reward at the last token that is not padding, so no row may end with the padding token.
    last_tokens = {row[-1] for row in rows}
    pad = tokenizer.pad_token_id
    if pad is None or pad in last_tokens:
        pad = next(i for i in range(len(last_tokens) + 1) if i not in last_tokens)
    model.config.pad_token_id = pad
    tokens = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(tokens, batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    outputs = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device))
    return outputs.logits[:, 0].float().tolist()
