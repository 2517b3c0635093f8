"""The C++ attention kernel, compiled once per machine: `python -m src.model.cpu.kernels`, which `make` runs.

Without it attention in float32 on a CPU is torch's, which is slower.
"""

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
# Beside the environment, not the code: jobs run from a snapshot of the code, while every node sees the environment.
_BUILD_FOLDER = Path(sys.prefix) / "share" / "alignment-sweep"
# No flag changes results: sums are reordered only where the source asks for it (`omp simd`), and NaN stays NaN.
_FLAGS = (
    *("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
)


class NotBuiltError(Exception):
    """The kernel is not available; the message gives the reason and what to do."""


def _library() -> Path:
    """Return the path for this source, torch and kind of machine.

    Libraries of other versions are left in place for jobs that run an earlier snapshot of the code.
    """
    key = hashlib.sha256(repr((_FLAGS, torch.__version__, platform.machine())).encode())
    for source in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        key.update(source.read_bytes())
    return _BUILD_FOLDER / f"{_SOURCE.stem}-{key.hexdigest()[:12]}.so"


def build() -> Path:
    """Compile the kernel unless that is done, run it once, and return its path. Raises NotBuiltError."""
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
            "no C++ compiler found (g++, clang++); install one, then run python -m src.model.cpu.kernels"
        )
    draft, torch_folder = library.with_suffix(f".{os.getpid()}"), Path(torch.__file__).parent
    command = [
        *(*shlex.split(compiler), *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        *(f"-I{torch_folder / 'include' / subfolder}" for subfolder in ("", "torch/csrc/api/include")),
        *(str(_SOURCE), "-o", str(draft)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotBuiltError(f"{' '.join(command)}\n{done.stderr.strip()}")
        draft.replace(library)  # atomic: another process may be building the same library
    except OSError as error:
        raise NotBuiltError(f"{error.filename}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


@cache
def load() -> Any:
    """Return the operators `attention` and `attention_backward`, run once on this processor. Raises NotBuiltError."""
    if not _library().exists():
        raise NotBuiltError("CPU kernel not built: run `python -m src.model.cpu.kernels`")
    try:
        torch.ops.load_library(str(_library()))
        x = torch.ones(1, 16, 16)
        torch.ops.alignment_sweep.attention(x, x, x, torch.tensor([[0, 16, 0, 0]]), 1.0)
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotBuiltError(f"CPU kernel does not run on this machine: {reason}") from error
    return torch.ops.alignment_sweep
