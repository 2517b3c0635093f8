"""Every attention backend that runs here against dense attention in float64: outputs and gradients, and twice the same.

The shapes are those where kernels go wrong: grouped heads, small and large heads, responses that attend to a prompt far
before them, segments of a single query, and (on a card) 8k tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check.errors import error_ratios, relative_errors, worst
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from src.data.examples import Example
from src.errors import ConfigError
from src.model.attention import ATTENTION_BACKENDS, resolve_backend
from src.model.packing import Layout, pack

HEADS = ((4, 4), (6, 2), (24, 8))
NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")
FLOAT32 = Limit(2e-5, "sums of up to 8k float32 products are off by some 1e-6")
BF16 = Limit(1.2, "no kernel may be further from float64 than attention written out in bf16 is; 20 % for order of sums")
SAME = Limit(0.0, "with deterministic algorithms two runs have the same bits")


class Case(NamedTuple):
    """heads, key-value heads, dimensions a head, and the layout as (prompt, response, response) lengths."""

    heads: int
    kv_heads: int
    width: int
    pairs: tuple[tuple[int, int, int], ...]

    @property
    def label(self) -> str:
        tokens = sum(map(sum, self.pairs))
        return f"{self.heads}:{self.kv_heads} heads of {self.width}, {tokens} tokens"


def cases(on_card: bool) -> list[Case]:
    """Return the shapes that are checked."""
    short = ((7, 5, 1), (150, 40, 33), (1, 1, 9), (64, 128, 64))
    if not on_card:
        return [Case(4, 4, 16, short), Case(6, 2, 16, short), Case(6, 2, 64, ((200, 180, 150),))]
    long = ((5000, 1500, 1700), *short)
    return [Case(h, kv, d, short) for h, kv in HEADS for d in (16, 64, 128)] + [Case(24, 8, 128, long)]


def layout_of(pairs: tuple[tuple[int, int, int], ...], device: torch.device) -> Layout:
    """Return the layout of packed pairs whose prompts and responses have these many positions."""
    # The last token of a response is predicted and has no position.
    examples = [Example((0,) * prompt, ((0,) * (a + 1), (0,) * (b + 1))) for prompt, a, b in pairs]
    return pack(examples, range(len(examples))).to(device).layout


def dense(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout) -> Tensor:
    """Return attention (1, n, heads, d) written out segment by segment and head by head, in the dtype of its arguments.

    The softmax is at least float32.
    """
    group = query.shape[1] // key.shape[1]
    outputs = []
    for s in layout.segments:
        prefix, own = s.prefix_end - s.prefix_start, s.end - s.start
        mask = torch.ones(own, prefix + own, dtype=torch.bool, device=query.device).triu(1 + prefix)
        heads = []
        for head in range(query.shape[1]):
            q, k, v = query[0, head, s.start : s.end], key[0, head // group], value[0, head // group]
            keys, values = (torch.cat([x[s.prefix_start : s.prefix_end], x[s.start : s.end]]) for x in (k, v))
            scores = (q @ keys.t() * scaling).masked_fill(mask, -torch.inf)
            softmax_dtype = torch.promote_types(query.dtype, torch.float32)
            heads.append(scores.softmax(-1, dtype=softmax_dtype).to(query.dtype) @ values)
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)[None]


def run(setting: Setting) -> list[Row]:
    rows: list[Row] = []
    for case in cases(setting.on_card):
        for precision in ("fp32", "bf16"):
            rows += check_case(setting, case, precision)
    return rows


def check_case(setting: Setting, case: Case, precision: str) -> list[Row]:
    """Return one row per backend that runs in this precision: the worst of its output and three gradients."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = random_inputs(case, setting.device, dtype)
    layout = layout_of(case.pairs, setting.device)
    scaling = case.width**-0.5
    exact = with_gradients(lambda *x: dense(*x, scaling, layout), [x.double() for x in inputs])
    # In bf16 the yardstick is not a number but the error of the plain product.
    plain = with_gradients(lambda *x: dense(*x, scaling, layout), inputs) if precision == "bf16" else None
    rows = []
    for backend in available(setting.device, precision):
        attend = ATTENTION_BACKENDS[backend]
        actual = with_gradients(lambda *x: attend(*x, scaling, layout), inputs)  # noqa: B023
        label = f"{backend}, {precision}, {case.label}"
        if plain is None:
            errors, kind, limit = relative_errors(actual, exact), "error to float64", FLOAT32
        else:
            errors, kind, limit = error_ratios(actual, plain, exact), "error over that of plain bf16", BF16
        rows.append(worst(setting, f"{label}: {kind}", errors, NAMES, limit))
        with deterministic():
            first, second = (with_gradients(lambda *x: attend(*x, scaling, layout), inputs) for _ in range(2))  # noqa: B023
        different = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
        rows.append(setting.row(f"{label}: tensors that differ between two runs", different, "", SAME))
    return rows


def random_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return queries, keys and values (1, heads, n, d), with scores of a trained model's spread."""
    generator = torch.Generator().manual_seed(0)
    n = sum(map(sum, case.pairs))
    heads = (case.heads, case.kv_heads, case.kv_heads)
    made = [torch.randn(1, h, n, case.width, generator=generator) for h in heads]
    made[0] = 2 * made[0]
    return [x.to(device, dtype) for x in made]


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of the three inputs, for one random gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def available(device: torch.device, precision: str) -> Iterator[str]:
    """Yield the backends that run on this device in this precision."""
    for backend in ATTENTION_BACKENDS:
        with contextlib.suppress(ConfigError):
            yield resolve_backend(backend, device, precision)[0]


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms, in which sums have one order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
