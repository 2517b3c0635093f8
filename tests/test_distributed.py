"""How a process joins the ranks of its run. GPUs and the process group are simulated."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from src import distributed


@pytest.fixture
def joined(monkeypatch):
    """Simulate a process group; return what it was asked for."""
    asked = {}
    monkeypatch.setattr(distributed, "_context", None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **options: asked.update(control=options["timeout"]))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return asked


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(3, 8, 3), (3, 1, 0), (5, 4, 1)])
def test_libraries_are_told_the_gpu_that_a_process_uses_among_those_it_sees(
    local_rank, visible, index, joined, monkeypatch
):
    """Where a task sees its own GPU alone, DeepSpeed would take cuda:3 of one by LOCAL_RANK."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    distributed.init_distributed("zero3")
    assert chosen == [index] and os.environ["LOCAL_RANK"] == str(index)
    assert joined["backend"] == "cpu:gloo,cuda:nccl"


def test_a_step_that_one_rank_never_joins_ends_within_half_an_hour_and_control_messages_may_take_days(
    joined, monkeypatch
):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.init_distributed("ddp").rank == 3
    assert timedelta(minutes=10) <= joined["timeout"] <= timedelta(minutes=30)
    assert joined["control"] >= timedelta(days=1)
