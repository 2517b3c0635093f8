"""Ctrl-C prints one line and no traceback, even while a command is still importing its modules."""

import signal
import subprocess
import sys

import pytest

from tests.support.commands import ROOT, environment
from tests.support.kills import stopping_at, wait_until_stopped


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hydra", "omegaconf", "src.planning.plan", "torch", "src.stages.runner"])
def test_an_interrupt_while_a_module_is_imported_is_one_line(module, tmp_path):
    command = [sys.executable, "-m", "src.train", f"output_dir={tmp_path}", "tracking=none", "beta=1"]
    process = subprocess.Popen(command, cwd=ROOT, env=stopping_at(module), stderr=subprocess.PIPE, text=True)
    wait_until_stopped(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    stderr = process.communicate(timeout=300)[1]
    # Python ends by the signal itself, which a shell shows as 130 too, when Ctrl-C came inside an import in C.
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert "Interrupted" in stderr and "Traceback" not in stderr


def test_an_interrupt_that_makes_an_import_raise_another_exception_is_one_line(tmp_path):
    """OmegaConf does so: a `finally` block of its restores flags of an object that is not complete yet."""
    (tmp_path / "hydra.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nfinally:\n    None.restore()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "src.train"],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "\nInterrupted. Run the same command again.\n")
