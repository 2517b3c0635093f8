"""Tables of points with synthetic results."""

from __future__ import annotations

import pandas as pd

from sweeps.analysis.results import COLUMNS, NUMBERS


def points(*rows):
    """Return a points.csv of finished points; rows: the columns that differ from the defaults."""
    base = dict.fromkeys(COLUMNS) | {"setup": "s", "method": "dpo", "init": "sft", "variant": "", "state": "done"}
    base |= {"lr": 1e-3, "seed": 0, "quality_reporting": 0.5, "quality_reporting_se": 0.01, "seconds": 1.0}
    for name in ("quality", "quality_selection", "kl_sequence", "kl_token", "kl_sequence_rb", "kl_token_rb"):
        base |= {name: 0.5, f"{name}_se": 0.01}
    base |= {"reward_accuracy": 0.5, "reward_margin": 1.0, "response_tokens": 9.0}
    table = pd.DataFrame([base | row | {"identity": str(n)} for n, row in enumerate(rows)])
    return table.astype(dict.fromkeys(NUMBERS, float))
