"""The table that AlpacaEval's length-controlled win rate is fitted with: of a file, the hub's cache, or the hub."""

from __future__ import annotations

import csv
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from src.config.paths import naming
from src.errors import ConfigError

NUM_INSTRUCTIONS = 805  # of the evaluation set
REPOSITORY, FILE = "tatsu-lab/alpaca_eval", "df_gamed.csv"  # on the hub, a dataset
COLUMNS = ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
_NUMBERS = COLUMNS[2:5]


class NoDifficulties(Exception):
    """The table cannot be had; the message says why."""


def check_difficulties(file: str, key: str) -> None:
    """Raise ConfigError, naming the key, for a file that is not AlpacaEval's table.

    The package finds the difficulty of an instruction by its row, so the first 805 rows are those of 805 instructions.
    """
    try:
        with naming(key, file), open(file, newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ConfigError(f"{key}={file}: has no column {missing[0]}; it is AlpacaEval's {FILE}")
            count = 0
            for count, row in enumerate(reader, 1):
                if count <= NUM_INSTRUCTIONS and row["index"] != str(count - 1):
                    raise ConfigError(f"{key}={file}: row {count} has index {row['index']}; it must be {count - 1}")
                for name in _NUMBERS:
                    float(row[name])
            if count < NUM_INSTRUCTIONS:
                raise ConfigError(
                    f"{key}={file}: has {count} rows; it needs one for each of {NUM_INSTRUCTIONS} instructions"
                )
    except ConfigError:
        raise
    except (csv.Error, ValueError, TypeError) as error:
        raise ConfigError(
            f"{key}={file}: cannot be read as AlpacaEval's {FILE} ({' '.join(str(error).split())})"
        ) from None


@contextmanager
def difficulties(file: str | None) -> Iterator[None]:
    """Let the package alpaca-eval read its table, in the body, from the file; without one as it does, from the hub.

    Raises NoDifficulties at once where that is bound to fail: the hub's client tries for minutes.
    """
    from alpaca_eval.metrics import glm_winrate  # the optional package

    if file is None and (reason := why_unreachable()) is not None and (file := _cached()) is None:
        raise NoDifficulties(reason)
    original = glm_winrate.hf_hub_download
    if file is not None:
        glm_winrate.hf_hub_download = lambda **_: file  # the package knows no other way
    try:
        yield
    finally:
        glm_winrate.hf_hub_download = original


def why_unreachable() -> str | None:
    """Return why the hub is not even tried; None where it may answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname
    if getproxies():  # which resolves the name
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host} cannot be resolved: {error.strerror}"
    return None


def _cached() -> str | None:
    from alpaca_eval import constants
    from huggingface_hub import try_to_load_from_cache

    options: dict[str, Any] = {"cache_dir": constants.DEFAULT_CACHE_DIR, "repo_type": "dataset"}
    cached = try_to_load_from_cache(REPOSITORY, FILE, **options)
    return cached if isinstance(cached, str) else None
