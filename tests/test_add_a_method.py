"""docs/add-a-method.md, worked through: its blocks applied to a copy of the project, its commands run there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL, environment

PAGE = (ROOT / "docs/add-a-method.md").read_text()
BLOCK = re.compile(
    r"^(?:A new file )?`(?P<path>[^`]+)`"
    r"(?:, (?P<where>before|after) the line that begins (?P<tick>`+) ?(?P<line>.+?) ?(?P=tick))?:"
    r"\n\n```\w+\n(?P<text>.*?)```$",
    re.M | re.S,
)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def apply(block: re.Match[str], folder: Path) -> None:
    path, text = folder / block["path"], block["text"]
    if block["where"] is None:
        assert not path.exists(), f"{path} is not new"
        path.write_text(text)
        return
    lines = path.read_text().splitlines(keepends=True)
    found = [i for i, line in enumerate(lines) if line.lstrip().startswith(block["line"])]
    assert len(found) == 1, f"{block['path']}: {len(found)} lines begin {block['line']}"
    lines.insert(found[0] + (block["where"] == "after"), text)
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this project, before the page."""
    folder = tmp_path_factory.mktemp("project")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def test_every_block_of_the_page_says_where_it_goes():
    blocks = list(BLOCK.finditer(PAGE))
    assert len(blocks) == len(re.findall(r"^```\w", PAGE, re.M)) - len(re.findall("^```sh", PAGE, re.M)) > 8
    assert {command.split()[2] for command in COMMANDS} == {"ruff", "benchmarks.methods", "pytest", "src.train"}


def test_the_page_adds_a_method_up_to_the_report(copy, tmp_path):
    refused = run(copy, "src.train", "method=rdpo", f"output_dir={tmp_path}", "dry_run=true")
    assert refused.returncode == 2 and "rdpo" in refused.stderr  # the control: without the page there is none
    for block in BLOCK.finditer(PAGE):
        apply(block, copy)
    assert (done := run(copy, "ruff", "check", ".")).returncode == 0, done.stdout

    # Of the tests what concerns a method: neither TRL's side nor the rest of conf/.
    more = {
        "src.train": [*SMALL, f"output_dir={tmp_path}"],
        "pytest": ["-k", "(rdpo or table or numbers or every_method) and not trl"],
    }
    printed = {}
    for command in COMMANDS:
        arguments = shlex.split(command)[2:]
        done = run(copy, *arguments, *more.get(arguments[0], []))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout
    _, benchmark, tests, one, sweep, options, demo = printed.values()

    assert re.search(r"^\| rDPO \| 0\.", benchmark, re.M)
    assert int(re.search(r"(\d+) passed", tests)[1]) > 20
    assert "result.json" in one
    assert re.search(r"│ rDPO +│", sweep) and re.search(r"│ DPO +│", sweep)
    folder = tmp_path / "sweeps" / "robust"
    assert set(yaml.safe_load((folder / "best.yaml").read_text())["mini_tldr"]) == {"dpo", "rdpo"}
    assert "rDPO" in (folder / "report.html").read_text()
    for share in ("0.0", "0.1", "0.3"):
        assert f"rdpo beta=0.1 lr=0.001 method.label_smoothing={share}" in options
    assert len(re.findall(r"^(?:to do|done) +\w+  \S+  rdpo ", demo, re.M)) == 6
    listed = yaml.safe_load((ROOT / "conf/beta_grid/mini_tldr.yaml").read_text())
    assert f"{sum(map(len, listed.values())) + 6} points" in demo
