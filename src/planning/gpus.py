"""GPUs that `engine.gpu` can name: what they hold and how fast their kernels are, from conf/gpus.yaml. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from src.config.schema import CONF_DIR
from src.errors import ConfigError

GPUS_FILE = CONF_DIR / "gpus.yaml"
_GIB = 2**30
CARDS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Gpu:
    """One card. Rates are what kernels reach; each has its source in conf/gpus.yaml."""

    name: str
    memory: int  # bytes, as torch.cuda.mem_get_info has them
    context: int  # bytes of them that torch cannot allocate
    capability: tuple[int, int]  # CUDA's compute capability
    multiprocessors: int
    bf16_peak: float  # FLOP/s of a large square product in bf16
    bf16: float  # FLOP/s of the products of a training step in bf16
    fp32: float  # FLOP/s of products in float32
    attention_forward: float  # FLOP/s of FlashAttention 2, causal
    attention_backward: float
    bandwidth: float  # bytes/s
    interconnect: float  # bytes/s received by one card from the others of its machine
    network: float  # the same from cards of other machines
    launch: float  # seconds of the host for one kernel
    least_kernel: float  # seconds of the device for the smallest kernel

    @property
    def usable(self) -> int:
        """The bytes that torch can allocate on an otherwise free card."""
        return self.memory - self.context

    def exchange_rate(self, ranks: int) -> float:
        """Return the bytes/s that a card receives in a collective of so many cards."""
        return self.interconnect if ranks <= CARDS_OF_A_MACHINE else min(self.interconnect, self.network)


@lru_cache
def gpus() -> dict[str, Gpu]:
    """Return every card of conf/gpus.yaml by its name."""
    rows = yaml.safe_load(GPUS_FILE.read_text(encoding="utf-8"))
    return {name: _parse(name, row) for name, row in rows.items()}


def find_gpu(name: str) -> Gpu:
    """Return the card of this name. Raises ConfigError for one that conf/gpus.yaml does not have."""
    if name not in gpus():
        raise ConfigError(f"engine.gpu={name}: not in conf/gpus.yaml, which has {', '.join(gpus())}")
    return gpus()[name]


def find_device(device_name: str) -> Gpu | None:
    """Return the card that torch or the driver calls so, as `NVIDIA A100-SXM4-40GB` is a100_40; None for others."""
    words = {word.removesuffix("gb") for word in re.split(r"[^a-z0-9]+", device_name.lower())}
    return next((gpu for name, gpu in gpus().items() if words.issuperset(name.split("_"))), None)


def _parse(name: str, row: dict[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        memory=round(row["memory_gib"] * _GIB),
        context=round(row["context_gib"] * _GIB),
        capability=(row["capability"][0], row["capability"][1]),
        multiprocessors=row["multiprocessors"],
        bf16_peak=row["bf16_peak_tflops"] * 1e12,
        bf16=row["bf16_tflops"] * 1e12,
        fp32=row["fp32_tflops"] * 1e12,
        attention_forward=row["attention_forward_tflops"] * 1e12,
        attention_backward=row["attention_backward_tflops"] * 1e12,
        bandwidth=row["bandwidth_tb_s"] * 1e12,
        interconnect=row["interconnect_gb_s"] * 1e9,
        network=row["network_gb_s"] * 1e9,
        launch=row["launch_us"] * 1e-6,
        least_kernel=row["least_kernel_us"] * 1e-6,
    )
