"""CPU cores, GPUs and memory a process uses. GPUs are simulated."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src import hardware
from src.data.examples import Example
from src.model.logprobs import patch_model_
from src.training.token_budget import measure_token_budget
from tests.support.commands import ROOT


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    for name in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)


def test_processes_on_one_machine_share_its_cores(sixteen_cores):
    assert hardware.cores_of_process(1) == 16
    assert hardware.cores_of_process(8) == 2
    assert hardware.cores_of_process(32) == 1


def test_a_slurm_task_uses_the_cores_slurm_assigned(sixteen_cores, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert hardware.cores_of_process(8) == 6
    # The negative control: a single task whose own processes (torchrun, the local launcher) share its cores.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hardware.cores_of_process(8) == 2


def test_visible_gpus_are_those_of_cuda_visible_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert hardware.visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.visible_gpus() == []


@pytest.mark.parametrize(
    ("files", "gpus"),
    [
        (["proc/driver/nvidia/gpus/0000:01:00.0", "proc/driver/nvidia/gpus/0000:02:00.0", "dev/nvidia0"], ["0", "1"]),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm"], ["0", "1"]),
        (["dev/null"], []),
    ],
)
def test_gpus_are_counted_by_the_driver_or_by_device_files(files, gpus, monkeypatch, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(hardware, "_ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.visible_gpus() == gpus


class CachingAllocator:
    """torch.cuda's memory for the token budget: blocks of an earlier model stay cached until empty_cache."""

    def __init__(self, total, cached):
        self.total, self.cached = total, cached

    def mem_get_info(self, device):
        return self.total - self.cached, self.total

    def empty_cache(self):
        self.cached = 0


class Engine:
    zero, device = 0, torch.device("cpu")

    @staticmethod
    def micro_step(last):
        return torch.no_grad()


@pytest.mark.parametrize("released", [True, False])
def test_a_second_model_in_a_process_can_use_the_memory_cached_for_the_first(released, monkeypatch):
    allocator = CachingAllocator(total=80 * 2**30, cached=79 * 2**30)
    allocated = iter(range(0, 2**40, 2**24))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: released)  # the negative control: nothing is released
    monkeypatch.setattr(torch.cuda, "empty_cache", allocator.empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", allocator.mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    policy = patch_model_(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))
    policy.forward = lambda batch: batch  # only the simulated allocations matter
    examples = [Example((1,) * 100, ((2,) * 20, (3,) * 20))] * 80
    budget = measure_token_budget(Engine, policy, examples)
    assert budget > 10**6 if released else budget < 10**6


# Runs in its own process, since the heap of the test process is already fragmented.
FRAGMENTED_HEAP = """
from src import hardware

high_threshold, trimmer = hardware.HeapTrimmer(growth=10 << 30), hardware.HeapTrimmer(growth=100 << 20)
high_threshold.maybe_trim()
trimmer.maybe_trim()
blocks = [bytearray(b"x" * 50_000) for _ in range(8_000)]  # 400 MB, each below glibc's threshold for mmap
full = hardware._resident_bytes()
del blocks[:-1]  # the last block is at the end of the heap, so glibc does not shrink it by itself
high_threshold.maybe_trim()
assert hardware._resident_bytes() > full - (50 << 20)  # the negative control: growth is below the threshold
trimmer.maybe_trim()
assert hardware._resident_bytes() < full - (300 << 20)
assert trimmer.baseline is None
"""


def test_a_fragmented_heap_is_trimmed_once_it_has_grown():
    if not sys.platform.startswith("linux") or "glibc" not in platform.libc_ver()[0]:
        pytest.skip("malloc_trim is glibc's")
    done = subprocess.run([sys.executable, "-c", FRAGMENTED_HEAP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
