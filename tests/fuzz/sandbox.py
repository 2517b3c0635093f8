"""A folder in which one case runs, and the commands in it.

A command is a forked child of this process, which has imported everything already: that saves seconds per command.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What a command imports sooner or later, so that a child needs no seconds to import it.
PRELOADED = (
    *("src.train", "src.stages.runner", "src.judges.tldr", "sweeps.sweeper", "sweeps.aggregate", "sweeps.status"),
    *(f"src.stages.{kind}" for kind in ("sft", "reference", "align", "generate", "evaluate")),
)

# Keys in the environment of every command. They may appear in no output and in no file.
CANARIES = {
    "OPENAI_API_KEY": "sk-canary0openai0c0ffee0c0ffee0c0ffee",
    "WANDB_API_KEY": "canary0wandb0c0ffee0c0ffee0c0ffee0c0ffee",
    "HF_TOKEN": "hf_canary0hub0c0ffee0c0ffee0c0ffee0c",
}
TYPED_CANARY = "canary0typed0c0ffee"  # part of the secrets that cases put on the command line

MEMORY = 12 * 2**30  # bytes of address space of a command
FILE_SIZE = 2**30


@dataclass(frozen=True)
class Finished:
    """A command that has ended. code: None when it ran past its time limit and was killed."""

    command: str
    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """`work` is the current folder of commands, and output_dir=out is below it; `home` and `tmp` are the user's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work, self.home, self.tmp = root / "work", root / "home", root / "tmp"
        for folder in (self.work, self.home, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)
        self.out = self.work / "out"
        self.commands: list[str] = []
        self.codes: list[int | None] = []
        self.messages: list[str] = []  # last line on stderr

    def environment(self) -> dict[str, str]:
        programs = self.root.parent / "programs"  # git alone: no case starts another program
        if not programs.exists():
            programs.mkdir(exist_ok=True)
            if (git := shutil.which("git")) and not (programs / "git").exists():
                (programs / "git").symlink_to(git)
        return {
            "PATH": str(programs),
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(self.tmp)),
            "COLUMNS": "200",
            **CANARIES,
        }

    @property
    def outputs(self) -> list[Path]:
        """What the last command wrote on stdout and stderr."""
        return [self.root / "stdout", self.root / "stderr"]

    def start(self, *arguments: str, module: str = "src.train", timeout: float = 60) -> int:
        """Start the command; return the id of its process, which soon is that of its process group."""
        pid = os.fork()
        if pid == 0:
            _become(module, arguments, self.work, self.environment(), self.outputs, timeout)
        return pid

    def run(self, *arguments: str, module: str = "src.train", timeout: float = 60) -> Finished:
        """Run `python -m MODULE ARGUMENTS` in this sandbox."""
        started = time.monotonic()
        code = _wait(self.start(*arguments, module=module, timeout=timeout), timeout)
        seconds = time.monotonic() - started
        stdout, stderr = (path.read_bytes().decode(errors="backslashreplace") for path in self.outputs)
        command = " ".join(["python -m", module, *map(_quoted, arguments)])
        self.commands.append(command)
        self.codes.append(code)
        self.messages.append(stderr.strip().rpartition("\n")[2][:300])
        return Finished(command, code, stdout, stderr, seconds)


def preload() -> None:
    """Import everything a command may need. Call it once, in a process without threads, before the first fork."""
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
    for name in PRELOADED:
        importlib.import_module(name)


def _wait(pid: int, timeout: float) -> int | None:
    """Return the exit code, negative for a signal; None when the child ran past the limit. No descendant remains."""
    deadline, pause = time.monotonic() + timeout, 0.002
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):  # it has not made its process group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _become(
    module: str, arguments: Sequence[str], cwd: Path, environment: dict[str, str], outputs: list[Path], timeout: float
) -> None:
    """Turn this forked process into the command; does not return."""
    code: int = 1
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        for target, path in zip((0, 1, 2), (Path(os.devnull), *outputs), strict=True):
            mode = os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(path, mode, 0o600)
            os.dup2(descriptor, target)
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        limit = int(timeout) + 5
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Workers of a sweep are forked from the command, which has torch already, not from a server of their own.
        context = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
        forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        warnings.filterwarnings("ignore", message=".*found in sys.modules")  # it has been imported: see preload
        sys.argv = [module, *arguments]
        code = _exit_code(module)
    finally:
        os._exit(code)


def _exit_code(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as system_exit:
        code = system_exit.code if isinstance(system_exit.code, int) else int(system_exit.code is not None)
        if isinstance(system_exit.code, str):
            print(system_exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            traceback.print_exc()
            code = code or 120  # as the interpreter does
    return code


def _quoted(argument: str) -> str:
    """Return the argument as bash takes it, on one line whatever it contains."""
    if argument and all((c.isalnum() and c.isascii()) or c in "_-=./,:+@%" for c in argument):
        return argument
    if all(0x20 <= ord(c) < 0x7F for c in argument):
        return "'" + argument.replace("'", "'\\''") + "'"
    escaped = "".join(
        chr(b) if 0x20 <= b < 0x7F and chr(b) not in "'\\" else f"\\x{b:02x}" for b in os.fsencode(argument)
    )
    return f"$'{escaped}'"
