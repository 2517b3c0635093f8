"""A server that a rank of a run starts is a program of its own, and no rank."""

import os
import sys

import pytest

from src.errors import StageError
from src.serving.model_server import LOG_FILE, serving

# What torchrun sets for a rank (torch/distributed/elastic/agent), submitit exports, and accelerate adds.
OF_A_RANK = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"),
]
KEPT = {"CUDA_VISIBLE_DEVICES": "3", "HF_HUB_OFFLINE": "1", "MY_RANK": "5", "SLURM_JOB_ID": "17"}


def test_a_server_does_not_inherit_the_rank_of_the_process_that_starts_it(monkeypatch, tmp_path):
    for name in OF_A_RANK:
        monkeypatch.setenv(name, "1")
    for name, value in KEPT.items():
        monkeypatch.setenv(name, value)
    program = "import os; print(chr(10).join(sorted(os.environ)))"
    with (
        pytest.raises(StageError, match="exited with code 0"),
        serving(f'{sys.executable} -c "{program}"', 30, tmp_path, "fp32", tmp_path, lambda: None),
    ):
        pass
    inherited = set((tmp_path / LOG_FILE).read_text().split())
    assert inherited & set(OF_A_RANK) == set()
    assert set(KEPT) <= inherited, "the GPU and the user's own variables stay"
    assert set(OF_A_RANK) <= set(os.environ), "the control: this process has them"
