"""Rehearsed device time of one step of 128 pairs on an H100 by class of kernel, before and now (docs/performance.md).

`python -m benchmarks.steps_by_kernel` prints the table. Nothing is run on a GPU: seconds are those of FLOPs
and bytes of the kernels at the rates of conf/gpus.yaml, without the gaps between kernels that a real step has. Lengths
have the means of conf/dataset; the peak is that of the longest pair that the limits allow.
"""

from __future__ import annotations

from benchmarks.gpu_check.workloads import GIB, WORKLOADS, rehearsals, request_of

GPU = "h100"
CLASSES = {
    "products": "products",
    "attention": "attention",
    "casts": "casts",
    "elementwise": "norms, rotary embeddings, MLPs, residuals, logits",
    "accumulation": "sums of gradients over micro-batches",
    "optimizer": "clipping and AdamW",
    "exposed": "exchange with other ranks, where nothing is computed meanwhile",
}
# Of the code at 456570e, which cast float32 weights in every product and had no fused kernels: seconds by class, from
# an earlier version of the rehearsal with the same rates, and GiB at the peak. 3B UF ran with activation checkpointing;
# exchange was not counted.
BEFORE: dict[str, dict[str, float]] = {
    "3B TL;DR": {"products": 1.56, "attention": 0.08, "casts": 0.36, "elementwise": 1.18, "accumulation": 0.17}
    | {"optimizer": 0.07, "total": 3.41, "tokens": 59.5, "peak": 78.0},
    "3B UF": {"products": 3.66, "attention": 0.20, "casts": 0.55, "elementwise": 2.75, "accumulation": 0.01}
    | {"optimizer": 0.05, "total": 7.21, "tokens": 100.0, "peak": 73.1},
    "8B UF": {"products": 0.96, "attention": 0.02, "casts": 0.11, "elementwise": 0.48, "optimizer": 0.02}
    | {"total": 1.61, "tokens": 11.2, "peak": 46.0},
}


def table() -> str:
    """Return the table in markdown: a row a class, two columns a workload."""
    results = rehearsals([request_of(name, GPU) for name in WORKLOADS])
    now = [
        {kind: work.seconds for kind, work in result.work.items()}
        | {"total": result.seconds, "floor": result.floor_seconds, "host": result.host_seconds}
        | {"exposed": result.exposed_exchange_seconds, "tokens": result.tokens / 1000}
        | {"peak": result.peak / GIB, "micro-batches": result.micro_batches}
        for result in results
    ]
    for values in (*BEFORE.values(), *now):
        values["rate"] = 1000 * values["total"] / values["tokens"]
    columns = [(BEFORE[name], values) for name, values in zip(WORKLOADS, now, strict=True)]
    names = [f"{name}, one rank of {w.ranks}" if w.ranks > 1 else name for name, w in WORKLOADS.items()]
    lines = ["| seconds | " + " | ".join(f"{name}: before | now" for name in names) + " |"]
    lines.append("|---|" + "---:|" * (2 * len(names)))
    rows = [(key, label, "{:.2f}") for key, label in CLASSES.items()]
    rows += [("total", "**device time**", "**{:.2f}**"), ("floor", "floor: the products at the ceiling", "{:.2f}")]
    rows += [
        ("tokens", "thousands of tokens", "{:.1f}"),
        ("rate", "**ms for a thousand tokens**", "**{:.1f}**"),
    ]
    rows += [("host", "host time, meanwhile", "{:.2f}"), ("communication", "exchange in all", "{:.2f}")]
    rows += [("peak", "peak, GiB", "{:.1f}"), ("micro-batches", "micro-batches", "{:.0f}")]
    for key, label, form in rows:
        cells = [form.format(values[key]) if key in values else "" for pair in columns for values in pair]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
