"""Sweeps: what users call beside `src.train`, the sweeper, the search, and the reports."""

import src  # handles Ctrl-C during the imports of a command

__all__ = ["src"]
