"""server=auto: which program draws samples is decided when a run is planned, printed, recorded and hashed."""

import importlib.machinery
import importlib.util
import sys

import pytest

from src.config.sampler import describe_choice
from tests.support.commands import run_in_process
from tests.support.configs import identities, point

UF = ["setup=llama31_8b_uf", "beta=0.1"]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install a package of the name of vllm, and return a function that puts its program on PATH."""
    find, module = importlib.util.find_spec, importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: module if name == "vllm" else find(name, *rest)
    )

    def put_on_path():
        program = tmp_path / "bin" / "vllm"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    return put_on_path


def test_without_vllm_the_job_draws_the_samples_as_with_none():
    assert "vllm" not in sys.modules
    automatic = point(*UF)
    assert (automatic.server.name, automatic.server.command, automatic.server.is_automatic) == ("none", None, True)
    assert identities(*UF) == identities(*UF, "server=none")
    line = describe_choice([automatic])
    assert line.startswith("server=auto: vllm is not installed beside this Python, so samples are drawn in the job")
    assert describe_choice([point(*UF, "server=none")]) is None, "the control: nothing was left open"


def test_with_vllm_its_servers_draw_them_under_the_identities_of_vllm(installed):
    without = identities(*UF)
    assert point(*UF).server.name == "none" and "not on PATH" in describe_choice([point(*UF)])
    installed()
    assert identities(*UF) == identities(*UF, "server=vllm") != without
    assert describe_choice([point(*UF)]).startswith("server=auto: vllm is installed, so its servers draw the samples")
    assert point(*UF, "server.concurrency=7").server.concurrency == 7
    assert identities(*UF)["align"] == without["align"], "models do not depend on who samples"


@pytest.mark.parametrize(
    ("setup", "is_automatic"), [("llama31_8b_uf", True), ("llama32_3b_uf", True), ("mini_tldr", False)]
)
def test_which_setups_leave_it_open(setup, is_automatic):
    assert point(f"setup={setup}", "beta=0.1").server.is_automatic == is_automatic


def test_a_dry_run_says_which_sampler_was_chosen(tmp_path):
    done = run_in_process("-m", "dry_run=true", "engine.gpu=null", *UF, f"output_dir={tmp_path}")
    assert done.stdout.count("server=auto: vllm is not installed") == 1, done.stderr
    other = run_in_process("-m", "dry_run=true", "engine.gpu=null", *UF, "server=none", f"output_dir={tmp_path}")
    assert "server=auto" not in other.stdout
