"""Sweeps: what users call beside `src.train`, the sweeper, the search, and the reports."""

from typing import TYPE_CHECKING, Any

import src  # handles Ctrl-C during the imports of a command

if TYPE_CHECKING:
    from sweeps.notebook import open_study

__all__ = ["open_study", "src"]


def __getattr__(name: str) -> Any:
    """Import `open_study` when it is asked for: commands that plan start without pandas and matplotlib."""
    if name == "open_study":
        from sweeps.notebook import open_study

        return open_study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
