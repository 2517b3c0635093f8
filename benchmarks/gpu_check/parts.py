"""The parts of the check in their order; each is a file of this package."""

from __future__ import annotations

from benchmarks.gpu_check.setting import REHEARSED, Part

PARTS = (
    Part("environment", "environment", "correctness"),
    Part("attention", "attention_kernels", "correctness"),
    Part("head", "head", "correctness"),
    Part("whole step", "whole_step", "correctness"),
    Part("drift", "drift", "correctness"),
    Part("end to end", "end_to_end", "correctness", timeout=360),
    Part("processes", "processes", "correctness"),
    Part("memory", "memory", "speed", REHEARSED),
    Part("speed", "speed", "speed", REHEARSED, timeout=300),
    Part("sampling", "sampling", "speed"),
    Part("TRL", "trl_rows", "speed"),
)
