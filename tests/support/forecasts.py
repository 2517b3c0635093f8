"""The memory table of a dry run, by stage and column."""

from __future__ import annotations

import re


def memory_table(output: str) -> dict[str, dict[str, str]]:
    """Return stage -> column -> text of the table in what a dry run printed."""
    table = output.partition("memory of one process")[2].partition("\n\n")[0].splitlines()
    header = next(line for line in table if line.startswith("stage "))
    columns = re.split(r" {2,}", header)[1:]
    rows = (re.split(r" {2,}", line) for line in table if re.match(r"(sft|reference|align|generate) ", line))
    return {stage: dict(zip(columns, values, strict=True)) for stage, *values in rows}
