"""Every command in the README does what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, SMALL, environment, train
from tests.support.slurm_cluster import missing

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
CLUSTER = COMMANDS[COMMANDS.index("make slurm-install") : COMMANDS.index("make slurm-down") + 1]
RUNS = [shlex.split(c)[3:] for c in COMMANDS if c.startswith("python -m src.train")]


def test_no_command_is_left_out_of_these_tests():
    others = {c for c in COMMANDS if not c.startswith("python -m src.train")}
    # Those of the cluster have a test of their own.
    assert others - set(CLUSTER) == {"make demo", "make test", "make smollm2", "source .venv/bin/activate"}
    assert len(RUNS) == 10


def test_a_shell_takes_every_command_as_it_is_written():
    for line in COMMANDS:
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True).returncode == 0, line


@pytest.mark.parametrize("arguments", RUNS, ids=[" ".join(a) for a in RUNS])
def test_every_run_of_the_readme_is_accepted(arguments, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(20)))
    given = [a.replace("pairs.jsonl", str(pairs)) for a in arguments if a != "dry_run=true"]
    output = train(*given, f"output_dir={tmp_path}", "dry_run=true").stdout
    assert re.search(r"^\d+ points: 0 done, \d+ to do$", output, re.M)


def test_make_demo_sweeps_all_methods_and_shows_the_best_table(tmp_path):
    """The recipe of `make demo` itself, on a cut-down task."""
    arguments = " ".join([*SMALL, f"output_dir={tmp_path}", "beta=0.1"])
    done = subprocess.run(
        ["make", "demo", f"ARGS={arguments}"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("DPO", "IPO", "SimPO", "ORPO", "ASFT", "APO-Zero", "NCA", "Cal-DPO"):
        assert re.search(rf"│ {method} ", done.stdout), done.stdout
    assert f"{tmp_path}/sweeps/demo/report.html" in done.stdout


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("help", "demo", "test", "lint", "bench", "clean", "smollm2", "slurm-up", "chaos"):
        assert f"make {target} " in listed


def test_make_test_runs_the_suite():
    planned = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m pytest" in planned


def test_files_the_readme_links_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_readmes_way_to_a_cluster_and_back(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    root, out = tmp_path / "cluster", tmp_path / "out"
    lines = []
    for line in CLUSTER[1:]:  # what comes before is the installation, which .ci/run does
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
        assert "2 submitted now" in done.stdout and "2 points: 2 done" in done.stdout
        assert "no jobs to cancel" in done.stdout and (out / "sweeps" / "demo" / "report.html").exists()
    finally:
        subprocess.run(["bash", "-ec", lines[-1]], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert not list(root.glob("run/*.pid")) or not any(
        Path(f"/proc/{p.read_text().strip()}").exists() for p in root.glob("run/*.pid")
    )
