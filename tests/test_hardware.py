"""CPU cores, GPUs and memory a process uses. GPUs are simulated."""

import json
import os
import platform
import subprocess
import sys

import pytest

from src import hardware
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


@pytest.mark.parametrize(
    ("by_user", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_gpu_memory_is_in_expandable_segments_unless_the_user_has_set_something_else(by_user, expected):
    code = "import json, os, sys, src\nassert 'torch' not in sys.modules\nprint(json.dumps(dict(os.environ)))"
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | by_user
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {k: v for k, v in json.loads(done.stdout).items() if "ALLOC_CONF" in k} == expected


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
