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
from src.distributed import JointWork, Share, get_distributed
from src.errors import ConfigError, StageError
from src.judges import Comparison, Judged, Response, Verdict
from src.judges.answers import Answers, is_number, is_text
from src.model.loading import copy_weights_, device_of, load_pretrained, load_tokenizer
from src.planning.content import ContentPath, digest, locate, reading
from src.planning.identity import EvaluateInputs, JudgeInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

BATCH_SIZE = 16  # texts

Text = tuple[Prompt, str]  # of a response to the prompt


def reward_model(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Compare the rewards of response and baseline; equal ones are a tie.

    Rewards are kept by content: those of the baseline are computed once for a whole sweep.
    """
    judge = inputs.judge
    assert judge is not None
    texts: dict[str, Text] = {}
    keys: list[list[str]] = []  # of response and baseline
    for c in comparisons:
        keys.append([_key(judge, c.prompt, text) for text in c.texts[1:]])
        texts |= dict(zip(keys[-1], [(c.prompt, text) for text in c.texts[1:]], strict=True))
    # In batches of their own, which are the same whether those of the baseline are known or not.
    of_baseline = {baseline for _, baseline in keys}
    groups = [[k for k in texts if k not in of_baseline], [k for k in texts if k in of_baseline]]
    known = _answers_to(judge, resources.device, texts, groups, attempt)
    verdicts = [_compare(*(known[key]["reward"] for key in pair)) for pair in keys]
    calls = sum(known[key]["by"] == attempt.identity for key in texts)
    return Judged(verdicts, {"answers": 2 * len(keys), "calls": calls})


def grades(judge: JudgeInputs, resources: Resources, responses: Sequence[Response], attempt: Attempt) -> list[float]:
    """Return rewards, kept by content like those of `reward_model`."""
    keys = [_key(judge, response.prompt, response.text) for response in responses]
    texts = {key: (response.prompt, response.text) for key, response in zip(keys, responses, strict=True)}
    known = _answers_to(judge, resources.device, texts, [list(texts)], attempt)
    return [known[key]["reward"] for key in keys]


def _key(judge: JudgeInputs, prompt: Prompt, text: str) -> str:
    assert isinstance(judge.model, ContentPath)
    return digest([judge.model.fingerprint, prompt.messages, text])


def _answers_to(
    judge: JudgeInputs, device: str, texts: dict[str, Text], groups: list[list[str]], attempt: Attempt
) -> dict[str, dict[str, Any]]:
    """Return the answers to texts, by key, on every rank: those kept on disk, and others computed and kept there.

    groups: keys of the texts that have batches of their own.
    """
    answers = Answers.of_judge(judge, attempt.output_dir, {"reward": is_number, "by": is_text})
    answers.refresh()
    known = get_distributed().broadcast_object({key: answers.known[key] for key in texts if key in answers.known})
    if len(known) < len(texts):
        assert isinstance(judge.model, ContentPath)
        known |= _missing(judge.model, device, texts, groups, known, answers, attempt)
    return known


def _missing(
    path: ContentPath,
    device: str,
    texts: dict[str, Text],
    groups: list[list[str]],
    known: dict[str, dict[str, Any]],
    answers: Answers,
    attempt: Attempt,
) -> dict[str, dict[str, Any]]:
    """Return the answers that are not known, by key, on every rank; each computes its share, and keeps them on disk."""
    ranks, new = get_distributed(), dict[str, dict[str, Any]]()
    work = JointWork(ranks, len(known))

    def report(num_done: int) -> None:
        attempt.step(num_done, len(texts))

    for rewards in _rewards(path, texts, groups, device, ranks.share(known)):
        for reward in rewards.values():
            if not math.isfinite(reward):
                raise StageError(f"{path}: the reward of a response is {reward}; use another model")
        rows = {key: {"reward": r, "by": attempt.identity} for key, r in rewards.items() if key not in known}
        if rows:
            answers.add_all(rows)
        new |= rows
        report(work.advance(len(rows)))
    work.wait(report)
    return {key: answer for part in ranks.gather_objects(new) for key, answer in part.items()}


def _compare(response: float, baseline: float) -> Verdict:
    value = 0.5 if response == baseline else float(response > baseline)
    return Verdict(value, f"reward {response:.4g} against {baseline:.4g}")


def _rewards(
    path: ContentPath, texts: dict[str, Text], groups: list[list[str]], device: str, share: Share
) -> Iterator[dict[str, float]]:
    """Yield key -> reward of the texts of a share, in batches of one group and of similar length."""
    source = str(locate(path.location, path.key) or path.location)
    with reading(path):
        tokenizer = load_tokenizer(source, str(path))
        model = load_pretrained(AutoModelForSequenceClassification, source, str(path))
        copy_weights_(model)
    if model.config.num_labels != 1:
        raise ConfigError(f"{path} has {model.config.num_labels} labels; a reward model has one")
    model.to(device_of(device)).eval()
    apply = partial(tokenizer.apply_chat_template, tokenize=False) if tokenizer.chat_template else None
    control = ControlTokens(tokenizer, apply)
    ids = {key: _tokenize(tokenizer, control, *text) for key, text in texts.items()}
    longest, limit = max(map(len, ids.values())), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StageError(f"{path} reads {limit} tokens; the longest prompt with its response has {longest}")
    batches: list[list[str]] = []
    for group in groups:
        order = sorted(group, key=lambda key: len(ids[key]))
        batches += [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    for keys in share.of(batches):
        yield dict(zip(keys, _batch_rewards(model, tokenizer, [ids[key] for key in keys]), strict=True))


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
