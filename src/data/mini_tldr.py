"""mini TL;DR: generated posts of six facts, summaries of mixed quality, and the gold score that labels pairs.

`python -m src.data.mini_tldr` prints a few. docs/mini_tldr.md describes the task and measurements on it.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
WEIGHTS = {"who": 1.5, "act": 2.0, "place": 0.7, "time": 0.7, "amount": 1.0, "ask": 1.4}
QUALITIES = (0.15, 0.35, 0.55, 0.8, 0.95)  # of the demonstrators
LABEL_TEMPERATURE = 1.0  # Bradley-Terry noise of the preference labels
LENGTH_LIMIT = 24  # words; longer summaries lose 0.1 a word

_VALUES: dict[str, list[str]] = {
    **{slot: WORDS[slot] for slot in WEIGHTS},
    "who": [who for group in WORDS["who"].values() for who in group],
    "act": [first for first, _ in WORDS["act"]],
}
_ACT_WORDINGS = {wording: act[0] for act in WORDS["act"] for wording in act}
_PATTERNS = {
    slot: re.compile(r"\b(?:" + "|".join(map(re.escape, _ACT_WORDINGS if slot == "act" else values)) + r")\b")
    for slot, values in _VALUES.items()
}


@dataclass(frozen=True)
class Post:
    text: str
    facts: dict[str, str]  # who, act, place, time, amount, ask


def make_post(rng: random.Random) -> Post:
    subreddit = rng.choice(list(WORDS["who"]))
    act = rng.choice(WORDS["act"])
    facts = {"who": rng.choice(WORDS["who"][subreddit]), "act": act[0]}
    facts |= {slot: rng.choice(WORDS[slot]) for slot in ("place", "time", "amount", "ask")}
    wording = {**facts, "act": rng.choice(act)}
    sentences = [rng.choice(WORDS[part]).format(**wording) for part in ("event", "cost")]
    for distractor in rng.sample(WORDS["distractors"], rng.randint(1, 2)):
        years = rng.randint(2, 9)
        unrelated = {slot: rng.choice(WORDS[slot]) for slot in ("place", "time", "amount")}
        sentences.insert(rng.randint(0, len(sentences)), distractor.format(years=years, **unrelated))
    question = rng.choice(WORDS["question"]).format(**wording)
    return Post(f"r/{subreddit} POST: {' '.join(sentences)} {question} TL;DR:", facts)


def summarize(rng: random.Random, facts: dict[str, str], quality: float | None = None) -> str:
    """Return a summary of the given quality in [0, 1]; default: that of a random demonstrator.

    The lower it is, the more facts are dropped or wrong, and the more filler and rambling is added.
    """
    q = rng.choice(QUALITIES) if quality is None else quality
    stated: dict[str, str | None] = {}
    for slot, value in facts.items():
        stated[slot] = value if rng.random() < 0.35 + 0.6 * q else None
        if stated[slot] is not None and rng.random() < 0.35 * (1 - q):
            stated[slot] = rng.choice(_VALUES[slot])

    def filler() -> list[str]:
        return [rng.choice(WORDS["fillers"])] if rng.random() < 0.5 * (1 - q) else []

    parts = filler()
    parts += [stated["who"] or "someone", stated["act"] or "did something"]
    if stated["place"]:
        parts.append(f"in {stated['place']}")
    if stated["time"]:
        parts.append(f"on {stated['time']}")
    parts += filler()
    if stated["amount"]:
        parts.append(f", lost {stated['amount']} dollars")
    parts += filler()
    parts.append(f", {stated['ask']} ?" if stated["ask"] else ".")
    if rng.random() < 0.3 * (1 - q):
        parts.append(rng.choice(WORDS["ramblings"]))
    return " ".join(parts)


def gold_score(facts: dict[str, str], summary: str, finished: bool = True) -> float:
    """Return the weights of right facts minus penalties: wrong and repeated facts, filler, rambling, length, no end."""
    score = 0.0
    for slot, weight in WEIGHTS.items():
        mentions = [_ACT_WORDINGS.get(value, value) for value in _PATTERNS[slot].findall(summary)]
        right = mentions.count(facts[slot])
        score += weight * (right > 0) - 0.5 * max(0, right - 1) - weight * (len(mentions) - right)
    score -= 0.5 * sum(summary.count(filler) for filler in WORDS["fillers"])
    score -= 0.5 * sum(summary.count(mark) for mark in WORDS["rambling_marks"])
    score -= 0.1 * max(0, len(summary.split()) - LENGTH_LIMIT)
    return score - (0.0 if finished else 1.0)


def demonstrations(count: int, seed: int, quality: float | None = None) -> list[tuple[Post, str]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        post = make_post(rng)
        rows.append((post, summarize(rng, post.facts, quality)))
    return rows


def preferences(count: int, seed: int) -> list[tuple[Post, str, str]]:
    """Return (post, chosen, rejected): two demonstrations of a post, labeled by Bradley-Terry on their gold scores."""
    rng = random.Random(seed)
    rows: list[tuple[Post, str, str]] = []
    while len(rows) < count:
        post = make_post(rng)
        a, b = summarize(rng, post.facts), summarize(rng, post.facts)
        if a == b:
            continue
        advantage = (gold_score(post.facts, a) - gold_score(post.facts, b)) / LABEL_TEMPERATURE
        if rng.random() > 1 / (1 + math.exp(-advantage)):
            a, b = b, a
        rows.append((post, a, b))
    return rows


def posts(count: int, seed: int) -> list[Post]:
    rng = random.Random(seed)
    return [make_post(rng) for _ in range(count)]


if __name__ == "__main__":
    for post, chosen, rejected in preferences(4, seed=0):
        print(f"{post.text}\n  chosen   {gold_score(post.facts, chosen):5.1f}  {chosen}")
        print(f"  rejected {gold_score(post.facts, rejected):5.1f}  {rejected}\n")
