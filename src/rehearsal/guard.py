"""Builds the stand-in for CUDA devices (noop_guard.cpp) and loads it, before torch is imported. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from src.errors import ConfigError

SOURCE = Path(__file__).with_name("noop_guard.cpp")


def load_guard(compiler: str = "g++") -> Callable[[], None]:
    """Load the stand-in into this process; return what is to be called after torch has been imported.

    Raises ConfigError without a C++ compiler, or when torch has been imported already.
    """
    if "torch" in sys.modules:
        raise ConfigError("a rehearsal needs a process of its own: torch has been imported before its devices")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        _load(_build(torch_folder, ("HOOKS",), compiler))
        guard = _build(torch_folder, ("GUARD",), compiler)
        return lambda: _load(guard)
    _load(_build(torch_folder, ("HOOKS", "GUARD"), compiler))
    return lambda: None


def _load(library: Path) -> None:
    ctypes.CDLL(str(library))


def _build(torch_folder: Path, parts: tuple[str, ...], compiler: str) -> Path:
    """Compile parts of noop_guard.cpp against the installed torch, unless that was done before; return the library."""
    # The folder of torch is part of the name, because the library looks for torch's libraries there.
    content = hashlib.sha256(SOURCE.read_bytes() + str(torch_folder).encode()).hexdigest()[:12]
    name = "-".join(("guard", version("torch"), f"python{sys.version_info[0]}.{sys.version_info[1]}", *parts, content))
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "alignment-sweep"
    library = folder / f"{name}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"a rehearsal needs a C++ compiler, and {compiler} is not installed (Debian: apt install g++)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    draft = library.with_name(f".{uuid.uuid4().hex}.so")
    libraries = torch_folder / "lib"
    command = [compiler, str(SOURCE), "-o", str(draft), "-O1", "-shared", "-fPIC", "-std=c++20"]
    command += [f"-D{part}" for part in parts]
    command += [f"-I{torch_folder / 'include'}", f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
        raise ConfigError(f"{SOURCE.name} does not compile against torch {version('torch')}: {errors[0]}")
    os.replace(draft, library)
    return library
