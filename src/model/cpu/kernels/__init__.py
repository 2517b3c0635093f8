"""Kernels in C++, compiled once on the machine that sets the project up: `python -m src.model.cpu.kernels`, which `make` calls.
Without them everything runs through torch's own, more slowly."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("attention.cpp")
# With the environment, not with the code: jobs run a copy of that, and every node has the environment.
_BUILT = Path(sys.prefix) / "share" / "alignment-sweep"
# No flag changes what is computed: sums are taken in another order only where the source says so (`omp simd`), and
# numbers that are none stay that.
_FLAGS = (
    *("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
)


class NotBuiltError(Exception):
    """Why there are no compiled kernels, and what to do about it."""


def _library() -> Path:
    """Where they are for this source, torch and kind of machine: what was built for another is not found. Those stay,
    for jobs that run an earlier copy of the code."""
    wanted = hashlib.sha256(repr((_FLAGS, torch.__version__, platform.machine())).encode())
    for source in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        wanted.update(source.read_bytes())
    return _BUILT / f"{_SOURCE.stem}-{wanted.hexdigest()[:12]}.so"


def build() -> Path:
    """Compile them unless that is done, and see that they run. Raises NotBuiltError."""
    library = _library()
    if not library.exists():
        _compile(library)
    load()
    return library


def _compile(library: Path) -> None:
    names = ("g++", "c++", "clang++")
    compiler = os.environ.get("CXX") or next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        raise NotBuiltError(
            "no C++ compiler here (g++, clang++): install one, then run python -m src.model.cpu.kernels"
        )
    draft, home = library.with_suffix(f".{os.getpid()}"), Path(torch.__file__).parent
    command = [
        *(*shlex.split(compiler), *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        *(f"-I{home / 'include' / below}" for below in ("", "torch/csrc/api/include")),
        *(str(_SOURCE), "-o", str(draft)),
        *(f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotBuiltError(f"{' '.join(command)}\n{done.stderr.strip()}")
        draft.replace(library)  # whole or not at all, whoever else builds it
    except OSError as error:
        raise NotBuiltError(f"{error.filename}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


@cache
def load() -> Any:
    """Their operators, tried once on this processor. Raises NotBuiltError."""
    if not _library().exists():
        raise NotBuiltError("its kernel is not compiled: run python -m src.model.cpu.kernels")
    try:
        torch.ops.load_library(str(_library()))
        x = torch.ones(1, 16, 16)
        torch.ops.alignment_sweep.attention(x, x, x, torch.tensor([[0, 16, 0, 0]]), 1.0)
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotBuiltError(f"its kernel does not run here: {reason}") from error
    return torch.ops.alignment_sweep
