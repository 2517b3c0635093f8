"""Make the tables and the figure of docs/performance.md from the measurements of benchmarks.against_trl.

`python -m benchmarks.performance` writes outputs/benchmarks/performance.md and docs/images/performance.png; it leaves
out what was not measured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.against_trl import RESULTS
from benchmarks.our_side import MODEL, PAIRS, STEPS
from benchmarks.pairs import SHAPES, make_pairs

NAMES = {"tldr": "TL;DR", "ultrafeedback": "UltraFeedback"}
OPTIMIZATIONS = {
    "onednn": "oneDNN: MKL, and torch's attention",
    "attention": "attention in blocks through oneDNN: torch's",
    "last_layer": "a last layer that computes predicting positions only",
    "head": "a head that overwrites its logits: through autograd",
    "prefix": "one prompt for both responses",
    "packing": "several pairs per micro-batch",
}


def seconds(jobs: list[dict[str, Any]], **wanted: Any) -> float:
    """Return the median wall seconds of a step over all measurements whose job has these values."""
    matching = [job for job in jobs if all(job.get(key) == value for key, value in wanted.items())]
    return statistics.median(wall for job in matching for wall, _ in job["seconds"])


def useful_flops(shape: str, scale: float = 1.0, pairs: int = PAIRS, layers: int | None = None) -> float:
    """Return the useful FLOPs of a step; recomputation does not count.

    6 x parameters of the layers x (prompt once + both responses), 6 x head x response tokens, and for attention
    12 x layers x width x (query, key) pairs that are not masked.
    """
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    width, depth = config["hidden_size"], layers or config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    layer = width * width * (2 + 2 * kv / heads) + 3 * width * config["intermediate_size"]
    examples = make_pairs(shape, pairs * STEPS, scale)[pairs:]
    total = 0.0
    for e in examples:
        lengths = [len(r) for r in e.responses]
        unmasked = len(e.prompt) ** 2 / 2 + sum(r * len(e.prompt) + r * r / 2 for r in lengths)
        total += (
            6 * depth * layer * e.length
            + 6 * width * config["vocab_size"] * sum(lengths)
            + 12 * depth * width * unmasked
        )
    return total


def sweep_tokens() -> tuple[float, float]:
    """Return the token passes of the 200 runs of llama32_3b_tldr at median lengths: naive, and as planned here.

    A forward pass of one token counts 1, forward and backward 3. Naive: every run has its own SFT, an online reference,
    and one copy of the prompt per response.
    """
    prompt, response = SHAPES["tldr"]
    sft_rows, pairs, validation, points = 41_947, 73_396, 21_198, 200
    sft = 3 * sft_rows * (prompt + response)
    apart, shared = 2 * (prompt + response), prompt + 2 * response
    naive = points * (sft + (3 + 1) * pairs * apart + (1 + 1) * validation * apart)
    planned = sft + (pairs + validation) * shared + points * (3 * pairs * shared + validation * shared)
    return naive, planned


def table(results: dict[str, Any]) -> str:
    lines = ["| pairs, a step of 16 | ours, pairs/s | TRL, pairs/s | speedup | ours, tokens/s | ours, MFU |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        if shape in results:
            jobs = results[shape]["jobs"]
            a, b = seconds(jobs, who="ours"), seconds(jobs, who="trl")
            tokens = next(j["tokens"] for j in jobs if j["who"] == "ours")
            mfu = useful_flops(shape) / a / results[shape]["peak"]
            lines.append(
                f"| {NAMES[shape]}, float32, reference precomputed | {PAIRS / a:.2f} | {PAIRS / b:.3f} | {b / a:.1f} |"
                f" {tokens / a:.0f} | {100 * mfu:.0f} % |"
            )
    others = {
        "online_reference": "TL;DR, float32, TRL with its reference online",
        "defaults": "TL;DR, float32, TRL with its default gradient checkpointing",
        "bf16": "TL;DR, bf16",
        "orpo": "TL;DR, ORPO (TRL's experimental trainer)",
        "simpo": "TL;DR, SimPO (TRL's experimental trainer)",
    }
    for row, name in others.items():
        if row in results and "tldr" in results:
            jobs = results[row]["jobs"]
            a = (
                seconds(jobs, who="ours")
                if row in ("bf16", "orpo", "simpo")
                else seconds(results["tldr"]["jobs"], who="ours")
            )
            b = seconds(jobs, who="trl")
            lines.append(f"| {name} | {PAIRS / a:.2f} | {PAIRS / b:.3f} | {b / a:.1f} | | |")
    if "micro_batch" in results:
        for job in results["micro_batch"]["jobs"]:
            b = statistics.median(s[0] for s in job["seconds"])
            lines.append(
                f"| TL;DR, float32, TRL with {job['micro_batch']} pairs per micro-batch | | {PAIRS / b:.3f} | | | |"
            )
    return "\n".join(lines)


def memory_table(results: dict[str, Any]) -> str:
    lines = ["| two pairs per micro-batch | ours, GB | TRL, GB | ratio |", "|---|---:|---:|---:|"]
    for shape in SHAPES:
        gigabytes = {j["who"]: j["bytes"] / 1e9 for j in results["memory"]["jobs"] if j["shape"] == shape}
        a, b = gigabytes["ours"], gigabytes["trl"]
        lines.append(f"| {NAMES[shape]} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    return "\n".join(lines)


def gradients_table(results: dict[str, Any]) -> str:
    lines = [
        "| two pairs | float64 | float32 | ours to float64 | TRL's to float64 |",
        "|---|---:|---:|---:|---:|",
    ]
    for job in results["gradients"]["jobs"]:
        values = (job[key] for key in ("float64", "float32", "ours_rounding", "trl_rounding"))
        lines.append(f"| draw {job['draw']} | {' | '.join(f'{value:.1e}' for value in values)} |")
    return "\n".join(lines)


def ablation_table(results: dict[str, Any]) -> str:
    complete = seconds(results["ablation"]["jobs"], without=None)
    lines = ["| without | seconds per step | slowdown |", "|---|---:|---:|", f"| nothing | {complete:.1f} | 1.00 |"]
    for optimization, name in OPTIMIZATIONS.items():
        wall = seconds(results["ablation"]["jobs"], without=optimization)
        lines.append(f"| {name} | {wall:.1f} | {wall / complete:.2f} |")
    return "\n".join(lines)


def growth_table(results: dict[str, Any]) -> str:
    lines = ["| | seconds per step | pairs/s | MFU |", "|---|---:|---:|---:|"]

    def add(name: str, row: str, **job: Any) -> None:
        if row in results:
            wall = seconds(results[row]["jobs"], who="ours", **job)
            pairs = job.get("pairs", PAIRS)
            shape = {"scale": job.get("scale", 1.0), "pairs": pairs, "layers": job.get("layers")}
            mfu = useful_flops("tldr", **shape) / wall / results[row]["peak"]
            lines.append(f"| {name} | {wall:.1f} | {pairs / wall:.2f} | {100 * mfu:.0f} % |")

    add("16 pairs, 30 layers, median 416 tokens", "tldr")
    add("half as long", "length", scale=0.5)
    add("twice as long", "length", scale=2.0)
    add("8 pairs", "batch", pairs=8)
    add("32 pairs", "batch", pairs=32)
    add("10 layers", "size", layers=10)
    add("20 layers", "size", layers=20)
    return "\n".join(lines)


def figure(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{NAMES[shape]}: {who}", PAIRS / seconds(results[shape]["jobs"], who=key), key)
        for shape in SHAPES
        if shape in results
        for who, key in (("this project", "ours"), ("TRL 1.16", "trl"))
    ]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.45 * len(bars)), layout="constrained")
    colors = {"ours": "#0072B2", "trl": "#999999"}
    names, values, keys = zip(*reversed(bars), strict=True)
    drawn = axes.barh(names, values, color=[colors[k] for k in keys])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.set_xlabel("preference pairs per second (whole optimizer steps, float32, two cores)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = [table(results)]
    if "memory" in results:
        parts.append(memory_table(results))
    if {"ablation", "tldr"} <= results.keys():
        parts.append(ablation_table(results))
    parts.append(growth_table(results))
    if "gradients" in results:
        parts.append(gradients_table(results))
    naive, planned = sweep_tokens()
    parts.append(
        f"200 runs: {naive:.3g} token passes unshared, {planned:.3g} as planned: {naive / planned:.1f} times fewer"
    )
    text = "\n\n".join(parts) + "\n"
    RESULTS.with_name("performance.md").write_text(text)
    print(text)
    figure(results, Path("docs/images/performance.png"))


if __name__ == "__main__":
    main()
