"""What a process takes of the machine: CPU cores, GPUs, memory. The GPU side is simulated where there is none."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src import hardware as machine
from src.data.examples import Example
from src.model.logprobs import patch_model_
from src.training import token_budget as budget
from tests.support.commands import ROOT


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    for name in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)


def test_processes_of_one_machine_share_its_cores(sixteen_cores):
    assert machine.cores_of_process(1) == 16
    assert machine.cores_of_process(8) == 2
    assert machine.cores_of_process(32) == 1


def test_a_slurm_task_keeps_the_cores_it_was_given(sixteen_cores, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert machine.cores_of_process(8) == 6
    # The control: a single task whose own processes (torchrun, the local launcher) share its cores.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert machine.cores_of_process(8) == 2


def test_workers_share_out_the_gpus_they_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert machine.visible_gpus() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.visible_gpus() == []


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
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.visible_gpus() == gpus


class CachingAllocator:
    """torch.cuda's memory as the token budget sees it: what an earlier model left is cached until it is released."""

    def __init__(self, total, cached):
        self.total, self.cached = total, cached

    def mem_get_info(self, device):
        return self.total - self.cached, self.total

    def empty_cache(self):
        self.cached = 0


class Engine:
    zero = 0

    @staticmethod
    def micro_step(last):
        return torch.no_grad()


@pytest.mark.parametrize("released", [True, False])
def test_a_second_model_of_one_process_has_the_memory_that_the_first_left(released, monkeypatch):
    allocator = CachingAllocator(total=80 * 2**30, cached=79 * 2**30)
    allocated = iter(range(0, 2**40, 2**24))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: released)  # the control: nothing is released
    monkeypatch.setattr(torch.cuda, "empty_cache", allocator.empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", allocator.mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    policy = patch_model_(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)))
    policy.forward = lambda batch: batch  # what it computes does not matter, only what it seems to allocate
    examples = [Example((1,) * 100, ((2,) * 20, (3,) * 20))] * 80
    found = budget.on_gpu(Engine, policy, examples, torch.device("cpu"))
    assert found > 10**6 if released else found < 10**6


# In a process of its own: in one that has worked already, the pieces lie in what others have left.
HEAP_IN_PIECES = """
from src import machine

patient, freed = machine.HeapTrimmer(growth=10 << 30), machine.HeapTrimmer(growth=100 << 20)
patient.maybe_trim()
freed.maybe_trim()
pieces = [bytearray(b"x" * 50_000) for _ in range(8_000)]  # 400 MB, each below what glibc maps by itself
full = machine._resident_bytes()
del pieces[:-1]  # the last one keeps the heap as long as it is
patient.maybe_trim()
assert machine._resident_bytes() > full - (50 << 20)  # it has not grown by as much
freed.maybe_trim()
assert machine._resident_bytes() < full - (300 << 20)
assert freed.usual is None
"""


def test_what_a_heap_in_pieces_holds_goes_back_once_it_has_grown():
    if not sys.platform.startswith("linux") or "glibc" not in platform.libc_ver()[0]:
        pytest.skip("only glibc is asked to")
    done = subprocess.run([sys.executable, "-c", HEAP_IN_PIECES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
