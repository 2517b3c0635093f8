"""The boxes of TeX that mathematical answers stand in: `\\boxed{2}`, `\\boxed 2`, `\\fbox{2}`."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace after a backslash is text


def last_box(text: str) -> str | None:
    """Return what is in the last box of a text, nothing for one that is not whole; None without a box.

    One without braces ends with the formula that it is in, as in the evaluation code of MATH (Hendrycks et al. 2021).
    """
    end = max((match.end() for match in _BOX.finditer(text)), default=None)
    if end is None:
        return None
    rest = text[end:]
    if not rest.startswith("{"):
        return rest.partition("$")[0].partition("\n")[0].strip()
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return ""
