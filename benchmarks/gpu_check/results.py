"""What a part of the check returns: rows with a value, a limit and where it ran, as JSON. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1  # of results.json; raise it when a field changes its meaning

PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"


@dataclass(frozen=True)
class Limit:
    """The bound of a value and why it is there. at: `most` or `least`."""

    bound: float
    reason: str
    at: str = "most"

    def holds(self, value: float) -> bool:
        """Return whether the value is within the bound; a value that is not finite never is."""
        return math.isfinite(value) and (value <= self.bound if self.at == "most" else value >= self.bound)

    def __str__(self) -> str:
        return f"{'<=' if self.at == 'most' else '>='} {self.bound:.4g}"


@dataclass(frozen=True)
class Row:
    """One value of a part.

    where: the name of the card, `CPU, tiny shape`, or `rehearsed on fake CUDA`. limit: None for what is only recorded.
    note: what a reader has to know beside the number.
    """

    name: str
    value: float
    unit: str
    where: str
    limit: Limit | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.limit is None or self.limit.holds(self.value)


@dataclass(frozen=True)
class PartResult:
    """A part that has ended. status: passed, failed (a limit), error (an exception, or no time left) or skipped."""

    name: str
    group: str
    where: str
    status: str
    seconds: float
    rows: list[Row] = field(default_factory=list)
    message: str = ""  # of the error, or why it was skipped

    @staticmethod
    def of(name: str, group: str, where: str, seconds: float, rows: list[Row]) -> PartResult:
        """Return the result of a part that computed its rows."""
        missed = [row for row in rows if not row.passed]
        message = f"{missed[0].name} is {missed[0].value:.4g}, limit {missed[0].limit}" if missed else ""
        if len(missed) > 1:
            message += f"; {len(missed) - 1} more"
        return PartResult(name, group, where, FAILED if missed else PASSED, seconds, rows, message)

    @property
    def ok(self) -> bool:
        return self.status in (PASSED, SKIPPED)

    def line(self) -> str:
        """Return the one line that is printed when the part has ended."""
        outcome = f": {self.message}" if self.message else ""
        limited = [row for row in self.rows if row.limit is not None]
        counted = f"; {len(limited)} values within limits, {len(self.rows) - len(limited)} recorded"
        return (
            f"{self.status} in {self.seconds:.0f} s [{self.where}]{outcome}{counted if self.status == PASSED else ''}"
        )


def to_json(parts: list[PartResult], device: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the content of results.json; a value that is not finite is null, as JSON has none."""

    def row_json(row: Row) -> dict[str, Any]:
        return {**asdict(row), "value": row.value if math.isfinite(row.value) else None, "passed": row.passed}

    return {
        "schema": SCHEMA,
        "command": command,
        "device": device,
        "passed": all(part.ok for part in parts),
        "parts": [{**asdict(part), "rows": [row_json(row) for row in part.rows]} for part in parts],
    }


def from_json(content: dict[str, Any]) -> list[PartResult]:
    """Return the parts of a results.json. Raises ValueError for another schema."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"results.json has schema {content['schema']}, {SCHEMA} is expected")

    def row(passed: bool, limit: dict[str, Any] | None, value: float | None, **values: Any) -> Row:
        return Row(limit=Limit(**limit) if limit else None, value=math.nan if value is None else value, **values)

    return [PartResult(**{**part, "rows": [row(**values) for values in part["rows"]]}) for part in content["parts"]]
