"""What is to be rehearsed and what came of it, as JSON; and `rehearse`, which asks a process of its own. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from src.errors import ConfigError, StageError
from src.planning.content import digest
from src.store.files import atomic_write
from src.store.provenance import installed_version

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "candidates", "reference", "align", "generate")
TIMEOUT = 1800.0  # seconds; 128 pairs of a 3B model at whole depth take one minute
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "liger-kernel", "flash-attn")


@dataclass(frozen=True)
class Request:
    """One stage on one rank. Lengths are in tokens; `stage` is one of STAGES.

    Of training an optimizer step of the first `batch_size` examples is reported, with the optimizer's state there; of
    `reference` a pass over all examples; of `candidates` one batch of samples; and of `generate` one batch, then its
    log-probs and KL under two models. Before them comes a step, or a pass, of micro-batches of `longest`, of which only
    the peak counts.
    """

    stage: str
    config: dict[str, Any]  # the model's config.json
    gpu: str  # a name of conf/gpus.yaml
    # (prompt, response, ...) lengths of every example: two responses for pairs, one for SFT. Not for sampling.
    examples: tuple[tuple[int, ...], ...] = ()
    longest: tuple[int, ...] = ()  # the same of the longest example that the limits allow; empty: that of `examples`
    # As engine, model and trainer have them.
    precision: str = "bf16"
    strategy: str = "none"
    ranks: int = 1
    attention: str = "auto"
    activation_checkpointing: str = "auto"  # auto, true or false
    fused_kernels: str = "auto"  # auto, true or false
    lora: dict[str, Any] | None = None  # rank, alpha, targets
    max_tokens_per_micro_batch: int | None = None
    batch_size: int = 128
    method: str = "dpo"
    # Of sampling: prompts sampled together, the longest prompt, and the longest response.
    rows: int = 64
    prompt_tokens: int = 0
    new_tokens: int = 0
    # Depths that are rehearsed, from which a line is drawn to the depth of `config`; empty: the whole depth.
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"a rehearsal of stage={self.stage}: must be one of {', '.join(STAGES)}")
        if len(self.layers) == 1:
            raise ConfigError(
                f"a rehearsal of layers={self.layers[0]}: a line needs two depths, or none for all layers"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Request:
        examples = tuple(tuple(lengths) for lengths in value["examples"])
        tuples = {name: tuple(value[name]) for name in ("longest", "layers")}
        return Request(**{**value, **tuples, "examples": examples})

    @property
    def identity(self) -> str:
        """The digest of everything the result depends on: the request, our code, and the libraries it runs."""
        versions = {name: installed_version(name) for name in _PACKAGES}
        return digest({"request": self.to_json(), "versions": versions, "code": _code_digest()})


@dataclass(frozen=True)
class Work:
    """What kernels of one class do in the rehearsed step."""

    kernels: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0  # read and written
    seconds: float = 0.0  # of the device


@dataclass(frozen=True)
class Result:
    """What a request came to, at the model's whole depth. Sizes are in bytes, of one rank."""

    # One line that names the operation and file:line; what was reached before it is in the other fields.
    error: str | None = None
    parameters: int = 0  # of the whole model
    # What lasts: weights, gradients, optimizer_state; of sampling kv_cache, of `generate` reference_weights.
    held: dict[str, int] = field(default_factory=dict)
    peak_by_phase: dict[str, int] = field(default_factory=dict)  # load, budget, forward, backward, optimizer, ...
    peak: int = 0  # of steps with the optimizer's state; of scoring and sampling the highest of all
    held_at_peak: dict[str, int] = field(default_factory=dict)  # phase:operation that allocated -> bytes, largest first
    activation_bytes_per_token: float = 0.0  # held by one forward pass with gradients, without checkpointing
    token_budget: int | None = None  # configured or found
    micro_batches: int = 0
    checkpointed_micro_batches: int = 0  # of these, computed with activation checkpointing
    tokens: int = 0  # that the model reads; of sampling those that it samples
    supervised_tokens: int = 0
    work: dict[str, Work] = field(default_factory=dict)  # products, attention, casts, elementwise, ... -> work
    seconds: float = 0.0  # of the device: the sum over `work`, with exchange only where nothing is computed meanwhile
    exposed_exchange_seconds: float = 0.0  # of exchange with other ranks: that part of it
    host_seconds: float = 0.0  # launching the kernels; overlaps with the device's
    floor_seconds: float = 0.0  # what has to be at least: src/rehearsal/work.py:WorkMeter.floor
    host_copies: dict[str, int] = field(default_factory=dict)  # phase:direction -> copies between host and device
    syncs: dict[str, int] = field(default_factory=dict)  # phase:operation -> times the host waits for the device
    rehearsed_layers: tuple[int, ...] = ()  # empty: all
    substituted: tuple[str, ...] = ()  # kernels in whose place something stood

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Result:
        work = {name: Work(**row) for name, row in value["work"].items()}
        tuples = {name: tuple(value[name]) for name in ("rehearsed_layers", "substituted")}
        return Result(**{**value, **tuples, "work": work})


def draw_lengths(
    count: int,
    prompt: float,
    response: float,
    responses: int,
    max_tokens: int,
    max_prompt_tokens: int,
    spread: float = 0.3,
) -> tuple[tuple[int, ...], ...]:
    """Return log-normal lengths of these means, cut as a dataset is.

    spread: the standard deviation of the logarithm, 0.3 in TL;DR and 0.5 to 0.8 in UltraFeedback. Always the same draw.
    """
    rng = random.Random(0)

    def draw(mean: float) -> int:
        return round(mean * rng.lognormvariate(-(spread**2) / 2, spread))

    examples = []
    for _ in range(count):
        drawn = max(2, min(draw(prompt), max_prompt_tokens, max_tokens - 2))
        lengths = [max(2, min(draw(response), max_tokens - drawn)) for _ in range(responses)]
        examples.append((drawn, *lengths))
    return tuple(examples)


def longest_lengths(prompt: float, responses: int, max_tokens: int, max_prompt_tokens: int) -> tuple[int, ...]:
    """Return the lengths of the longest example that the limits allow: a prompt of usual length, and full responses."""
    length = min(round(prompt), max_prompt_tokens, max_tokens - 1)
    return length, *[max_tokens - length] * responses


def rehearse(request: Request, timeout: float = TIMEOUT) -> Result:
    """Return what the request comes to. See `rehearse_all`."""
    return rehearse_all([request], timeout)[0]


def rehearse_all(requests: Sequence[Request], timeout: float = TIMEOUT) -> list[Result]:
    """Return the result of every request: from the cache, and the others from one process of their own.

    The process is needed because the stand-in for CUDA devices must be loaded before torch is. Raises ConfigError when
    something is missing for a rehearsal (a C++ compiler), and StageError when the process fails or takes longer than
    `timeout` seconds. An error that the rehearsal found is no exception but `Result.error`.
    """
    entries = [_cache_folder() / f"{request.identity}.json" for request in requests]
    results = {entry: _read(entry) for entry in entries}
    # Equal requests once: samples of the baseline by one process and of policies by several are those.
    missing = {entry: request for entry, request in zip(entries, requests, strict=True) if results[entry] is None}
    if missing:
        for entry, made in zip(missing, _run(list(missing.values()), timeout), strict=True):
            results[entry] = made
            with contextlib.suppress(OSError):  # the cache only saves time
                entry.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(entry, json.dumps(made.to_json()))
    return [result for entry in entries if (result := results[entry]) is not None]


def _run(requests: Sequence[Request], timeout: float) -> list[Result]:
    """Rehearse in a process of its own. One request a line of JSON in, one result a line out."""
    lines = "".join(json.dumps(request.to_json()) + "\n" for request in requests)
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_JOB}
    # One core is enough, and no card is to be touched where there is one.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "src.rehearsal"]
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise StageError(f"the rehearsal took longer than {timeout:.0f} seconds") from None
    complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 2:
        raise ConfigError(complaint.removeprefix("error: "))
    if done.returncode:
        raise StageError(f"the rehearsal failed with exit code {done.returncode}: {complaint}")
    return [Result.from_json(json.loads(line)) for line in done.stdout.splitlines()]


# A rehearsal is one process; what a job set for its own ranks is not for it.
_OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "alignment-sweep" / "rehearsals"


def _read(entry: Path) -> Result | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Result.from_json(json.loads(entry.read_text(encoding="utf-8")))
    return None


@cache
def _code_digest() -> str:
    files = [file for pattern in ("*.py", "*.cpp", "*.yaml") for file in sorted((ROOT / "src").rglob(pattern))]
    content = hashlib.sha256()
    for file in (*files, ROOT / "conf" / "gpus.yaml"):
        content.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest()
