"""The parts of the check in their order; each is a file of this package."""

from __future__ import annotations

from benchmarks.gpu_check.setting import Part

PARTS = (
    Part("environment", "environment", "correctness"),
    Part("attention", "attention_kernels", "correctness"),
    Part("head", "head", "correctness"),
)
