"""mini TL;DR: generated posts of six facts, summaries of mixed quality, and the gold score that labels pairs.

`python -m src.data.mini_tldr` prints a few. docs/mini_tldr.md describes the task and measurements on it.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

WHO = {
    "relationships": ["my girlfriend", "my boyfriend", "my wife", "my husband", "my fiance", "my ex"],
    "family": ["my mother", "my father", "my brother", "my sister", "my uncle", "my cousin", "my grandmother"],
    "work": ["my boss", "my coworker", "my manager", "my client", "my intern", "the new guy"],
    "housing": ["my roommate", "my landlord", "my neighbor", "the super", "my subletter", "the tenant"],
}
# Events in two wordings: a summary uses the first, a post either.
ACTS = [
    ("borrowed my car", "took my car"),
    ("lost my keys", "misplaced my keys"),
    ("sold my guitar", "got rid of my guitar"),
    ("broke my laptop", "smashed my laptop"),
    ("read my diary", "went through my diary"),
    ("ate my lunch", "finished my lunch"),
    ("cancelled our trip", "called off our trip"),
    ("forgot my birthday", "did not remember my birthday"),
    ("adopted a dog", "brought home a dog"),
    ("quit the project", "walked away from the project"),
    ("raised the rent", "put the rent up"),
    ("painted the kitchen", "redid the kitchen"),
    ("stole my bike", "ran off with my bike"),
    ("skipped the wedding", "did not come to the wedding"),
    ("lied about money", "was not honest about money"),
    ("moved my desk", "dragged my desk away"),
]
PLACES = "boston denver austin seattle chicago toronto dublin berlin london portland miami oslo".split()
TIMES = "monday tuesday wednesday thursday friday saturday sunday".split()
AMOUNTS = ["50", "80", "100", "200", "300", "450", "600", "900", "1200", "2000"]
ASKS = [
    "should i leave",
    "should i apologize",
    "should i talk to them",
    "should i let it go",
    "should i ask for money",
    "should i tell someone",
    "should i move out",
    "should i wait",
]
FILLERS = [
    "honestly",
    "to be fair",
    "long story short",
    "i do not even know",
    "i mean",
    "anyway",
    "so yeah",
    "like i said",
]
RAMBLINGS = ["sorry for the long post .", "i do not know what to do .", "that is all .", "thanks for reading ."]
RAMBLING_MARKS = ("long post", "what to do", "that is all", "thanks for reading")
# Sentences of a post that are not about its facts; some carry a false place, time or amount.
DISTRACTORS = [
    "sorry for the long post .",
    "english is not my first language .",
    "i am on mobile .",
    "we have known each other for {years} years .",
    "it was raining that day .",
    "my friend in {place} says i am overreacting .",
    "this is a throwaway account .",
    "last {time} was fine .",
    "i have read the rules .",
    "i work near {place} .",
    "the cat is okay .",
    "a friend once paid {amount} dollars for less .",
]
WEIGHTS = {"who": 1.5, "act": 2.0, "place": 0.7, "time": 0.7, "amount": 1.0, "ask": 1.4}
QUALITIES = (0.15, 0.35, 0.55, 0.8, 0.95)  # of the demonstrators
LABEL_TEMPERATURE = 1.0  # Bradley-Terry noise of the preference labels
LENGTH_LIMIT = 24  # words; longer summaries lose 0.1 a word

_VALUES: dict[str, list[str]] = {
    "who": [w for group in WHO.values() for w in group],
    "act": [first for first, _ in ACTS],
    "place": PLACES,
    "time": TIMES,
    "amount": AMOUNTS,
    "ask": ASKS,
}
_ACT_WORDINGS = {wording: act[0] for act in ACTS for wording in act}


@dataclass(frozen=True)
class Post:
    text: str
    facts: dict[str, str]  # who, act, place, time, amount, ask


def make_post(rng: random.Random) -> Post:
    subreddit = rng.choice(list(WHO))
    act = rng.choice(ACTS)
    facts = {
        "who": rng.choice(WHO[subreddit]),
        "act": act[0],
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
        "amount": rng.choice(AMOUNTS),
        "ask": rng.choice(ASKS),
    }
    wording = {**facts, "act": rng.choice(act)}
    event = rng.choice(
        [
            "last {time} {who} {act} in {place} .",
            "{who} {act} on {time} while we were in {place} .",
            "so we were in {place} on {time} and {who} {act} .",
        ]
    ).format(**wording)
    cost = rng.choice(
        ["it cost me {amount} dollars .", "that is {amount} dollars gone .", "i am out {amount} dollars now ."]
    )
    sentences = [event, cost.format(**wording)]
    for distractor in rng.sample(DISTRACTORS, rng.randint(1, 2)):
        text = distractor.format(
            years=rng.randint(2, 9), place=rng.choice(PLACES), time=rng.choice(TIMES), amount=rng.choice(AMOUNTS)
        )
        sentences.insert(rng.randint(0, len(sentences)), text)
    ask = rng.choice(["{ask} ?", "my question is , {ask} ?"]).format(**wording)
    return Post(f"r/{subreddit} POST: {' '.join(sentences)} {ask} TL;DR:", facts)


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
        return [rng.choice(FILLERS)] if rng.random() < 0.5 * (1 - q) else []

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
        parts.append(rng.choice(RAMBLINGS))
    return " ".join(parts)


_PATTERNS = {
    slot: re.compile(r"\b(?:" + "|".join(map(re.escape, _ACT_WORDINGS if slot == "act" else values)) + r")\b")
    for slot, values in _VALUES.items()
}


def gold_score(facts: dict[str, str], summary: str, finished: bool = True) -> float:
    """Return the weights of right facts minus penalties: wrong and repeated facts, filler, rambling, length, no end."""
    score = 0.0
    for slot, weight in WEIGHTS.items():
        mentions = [_ACT_WORDINGS.get(value, value) for value in _PATTERNS[slot].findall(summary)]
        right = mentions.count(facts[slot])
        score += weight * (right > 0) - 0.5 * max(0, right - 1) - weight * (len(mentions) - right)
    score -= 0.5 * sum(summary.count(filler) for filler in FILLERS)
    score -= 0.5 * sum(summary.count(mark) for mark in RAMBLING_MARKS)
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
