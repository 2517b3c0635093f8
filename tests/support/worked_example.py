"""A page of docs that adds a part: its blocks are applied to a copy of the project, its commands run there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.commands import ROOT, environment

_BLOCK = re.compile(
    r"^(?:A new file )?`(?P<path>[^`]+)`"
    r"(?:, (?P<where>before|after|instead of) the line that begins (?P<tick>`+) ?(?P<line>.+?) ?(?P=tick))?:"
    r"\n\n```\w+\n(?P<text>.*?)```$",
    re.M | re.S,
)


class WorkedExample:
    def __init__(self, page: str, folder: Path) -> None:
        """Copy the project's files, as git lists them, to `folder`."""
        self.page, self.folder = (ROOT / "docs" / page).read_text(), folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
            if name and (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment() | {"PYTEST_ADDOPTS": "-n0"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def apply(self) -> None:
        """Apply every block of the page, and check the result with ruff."""
        blocks = list(_BLOCK.finditer(self.page))
        assert len(blocks) == len(re.findall(r"^```\w", self.page, re.M)) - len(re.findall("^```sh", self.page, re.M))
        assert blocks
        for block in blocks:
            self._put(block)
        modules = {block["path"] for block in blocks if block["path"].endswith(".py")}
        assert (done := self.run("ruff", "check", *modules)).returncode == 0, done.stdout

    def _put(self, block: re.Match[str]) -> None:
        path, text = self.folder / block["path"], block["text"]
        if block["where"] is None:
            assert not path.exists(), f"{path} is not new"
            path.write_text(text)
            return
        lines = path.read_text().splitlines(keepends=True)
        matches = [i for i, line in enumerate(lines) if line.lstrip().startswith(block["line"])]
        assert len(matches) == 1, f"{block['path']}: {len(matches)} lines begin {block['line']}"
        start = matches[0] + (block["where"] == "after")
        lines[start : start + (block["where"] == "instead of")] = [text]
        path.write_text("".join(lines))

    def run_commands(self, more: dict[str, list[str]]) -> list[str]:
        """Run the commands of the page and return what each printed. more: additional arguments, by module."""
        printed = []
        for line in (line for block in re.findall(r"```sh\n(.*?)```", self.page, re.S) for line in block.splitlines()):
            python, dash, module, *arguments = shlex.split(line)
            assert (python, dash) == ("python", "-m")
            done = self.run(module, *arguments, *more.get(module, []))
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
        return printed
