"""Every command in the README, the quickstart and the reference does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.support.commands import ROOT, SMALL, environment, run_in_process
from tests.support.fake_sweep import FakeSweep
from tests.support.slurm_cluster import missing


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


README, REFERENCE, QUICKSTART = map(commands, ("README.md", "docs/reference.md", "docs/quickstart.md"))
COMMANDS = list(dict.fromkeys(README + REFERENCE + QUICKSTART))
CLUSTER = REFERENCE[REFERENCE.index("make slurm-install") : REFERENCE.index("make slurm-down") + 1]
PLANS = [c.removesuffix(" dry_run=true") for c in COMMANDS if c.startswith("python -m src.train")]
RUNS = [shlex.split(c)[3:] for c in dict.fromkeys(PLANS)]
# The others, of the quickstart's sweep on a cluster, are run as the reference has them.
OF_A_SWEEP = [
    shlex.split(c)[2:] for c in QUICKSTART if "sweeps." in c and c.replace("/cluster", "/demo") not in CLUSTER
]

# Targets are up to date when these tests run; make must not install anything for them.
BUILT = (".venv/.run", ".venv/.dev", ".venv-docs/.done")
MAKE = ["make", *(word for target in BUILT for word in ("-o", target)), f"PY={sys.executable}"]


def make(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAKE, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def test_no_command_is_left_out_of_these_tests():
    others = {c for c in COMMANDS if not c.startswith(("python -m src.train", "python -m sweeps."))}
    tested = {"make demo", "make test", "make test-all", "make lint", ".ci/run", "make gpu-check"}  # test_gpu_check.py
    assert others - set(CLUSTER) == tested | {"make install", "make smollm2", "source .venv/bin/activate"}
    assert len(RUNS) == 15 and OF_A_SWEEP == [["sweeps.status", "outputs/sweeps/first"]]


def test_an_installation_runs_nothing():
    done = make("install")
    assert done.returncode == 0 and "python" not in done.stdout, done.stderr


def test_a_shell_takes_every_command_as_it_is_written():
    for line in COMMANDS:
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True).returncode == 0, line


@pytest.mark.parametrize("arguments", RUNS, ids=[" ".join(a) for a in RUNS])
def test_every_run_of_the_readme_is_accepted(arguments, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(20)))
    arguments = [a.replace("pairs.jsonl", str(pairs)) for a in arguments if not a.startswith("engine.gpu=")]
    done = run_in_process(*arguments, "engine.gpu=null", f"output_dir={tmp_path}", "dry_run=true")  # not rehearsed
    assert re.search(r"^\d+ points: 0 done, \d+ to do$", done.stdout, re.M), done.stderr


def test_the_status_command_of_the_quickstart_is_accepted(tmp_path):
    ((module, _),) = OF_A_SWEEP
    done = run_in_process(FakeSweep(tmp_path, Random(0)).folder.path, module=module)
    assert done.returncode == 0 and "12 to do" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_make_demo_sweeps_all_methods_and_shows_the_best_table(tmp_path):
    """The recipe of `make demo` itself, on a smaller task."""
    done = make("demo", "ARGS=" + " ".join([*SMALL, f"output_dir={tmp_path}", "beta=0.1"]))
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("DPO", "IPO", "SimPO", "ORPO", "ASFT", "APO-Zero", "NCA", "Cal-DPO"):
        assert re.search(rf"│ {method} ", done.stdout), done.stdout
    assert f"{tmp_path}/sweeps/demo/report.html" in done.stdout


def test_make_help_lists_every_target():
    listed = make("help").stdout
    for target in re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M):
        assert f"make {target} " in listed


@pytest.mark.parametrize(
    ("target", "tiers"), [("test", {"quick"}), ("test-all", {"quick", "slow"})], ids=["test", "test-all"]
)
def test_a_tier_runs_its_tests_and_no_others(target, tiers, tmp_path):
    """The recipe itself, on three tests that leave a file each; and its exit code is that of the tests."""
    probe = tmp_path / "test_probe.py"
    bodies = [
        f"@pytest.mark.{mark}\ndef test_{mark}():\n    pathlib.Path({str(tmp_path / mark)!r}).touch()\n"
        for mark in ("slow", "timing")
    ]
    quick = f"def test_quick():\n    pathlib.Path({str(tmp_path / 'quick')!r}).touch()\n"
    probe.write_text("\n\n".join(["import pathlib\nimport pytest", *bodies, quick]))
    arguments = f"ARGS=--config-file={ROOT}/pyproject.toml --rootdir={ROOT} -p no:cacheprovider {probe}"
    assert make(target, arguments).returncode == 0
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ""} - {"__pycache__"} == tiers
    probe.write_text("def test_quick():\n    assert False\n")
    assert make(target, arguments).returncode != 0


def test_every_test_module_belongs_to_the_full_tier_and_most_to_the_quick_one():
    collected = {}
    for target in ("test", "test-all"):
        done = make(target, "ARGS=--collect-only -p no:cacheprovider")
        assert done.returncode == 0, done.stdout + done.stderr
        collected[target] = set(re.findall(r"^(tests/test_\w+\.py)", done.stdout, re.M))
    modules = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert collected["test-all"] == modules
    assert len(modules) / 2 < len(collected["test"]) < len(modules)


@pytest.mark.parametrize("failing", [None, "lint", "test-all"])
def test_ci_lints_and_runs_every_test_and_fails_with_either(failing, tmp_path):
    """The script itself, with commands that only record that they were called in place of make and apt-get."""
    record = tmp_path / "record"
    for name in ("make", "apt-get", "chromium"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{record}\n[ "$1" != "{failing}" ]\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment() | {"PATH": path}, check=False)
    calls = [line for line in record.read_text().splitlines() if line in ("make lint", "make test-all")]
    assert calls == (["make lint"] if failing == "lint" else ["make lint", "make test-all"])
    assert (done.returncode == 0) == (failing is None)


def test_make_style_fails_on_what_ruff_or_the_contracts_refuse(tmp_path):
    """The recipe itself, with programs that fail in place of ruff and import-linter."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for failing in (None, "ruff check", "ruff format", "lint-imports"):
        for name in ("ruff", "lint-imports"):
            (tools / name).write_text(f'#!/bin/sh\n[ "{name} $1" != "{failing}" ] && [ "{name}" != "{failing}" ]\n')
            (tools / name).chmod(0o755)
        done = make("-o", f"{tmp_path}/.done", "style", f"LINT={tmp_path}")
        assert (done.returncode == 0) == (failing is None), done.stderr


def test_the_readmes_environment_has_the_project(tmp_path):
    activate = Path(sys.executable).with_name("activate")
    line = f"source {activate} && python -c 'import src, torch, hydra'"
    assert subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_readmes_way_to_a_cluster_and_back(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    root, out = tmp_path / "cluster", tmp_path / "out"
    lines = []
    for line in CLUSTER[1:]:  # the first line is the installation, which .ci/run does
        line = re.sub(r"^python ", f"{sys.executable} ", line).replace("outputs/", f"{out}/")
        if line.startswith("make"):
            line += f" ARGS='--root {root} --nodes 2'"
        if "src.train" in line:
            line += f" {' '.join(SMALL)} method=dpo,orpo beta=0.1 output_dir={out}"
        lines.append(line.replace(".slurm/env.sh", str(root / "env.sh")))
    assert [line.split()[:3][-1] for line in lines if line.startswith(sys.executable)] == [
        "src.train",
        "sweeps.status",
        "sweeps.cancel",
    ]
    try:
        script = ["bash", "-ec", "\n".join(lines[:-1])]
        done = subprocess.run(
            script, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\b2 submitted\b", done.stdout) and "2 points: 2 done" in done.stdout
        assert "no jobs to cancel" in done.stdout and (out / "sweeps" / "demo" / "report.html").exists()
    finally:
        subprocess.run(["bash", "-ec", lines[-1]], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert not list(root.glob("run/*.pid")) or not any(
        Path(f"/proc/{p.read_text().strip()}").exists() for p in root.glob("run/*.pid")
    )
