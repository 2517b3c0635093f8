"""What tells points apart besides setup, method, init, beta, lr and seed: `method.gamma_beta_ratio=0.3`."""

from __future__ import annotations

from collections import defaultdict

from src.config import Point, leaves

# Columns of their own, or nothing a result depends on.
_NOT_VARIANTS = {"beta", "lr", "seed", "sweep", "tracking", "output_dir", "keep", "dry_run", "best_from"}
_NOT_VARIANTS |= {"beta_grid", "lr_grid"}
# One folder, one record, one answer to "does it run": these cannot differ between the points of a sweep.
_ONE_FOR_ALL = ("output_dir", "keep", "dry_run", "sweep.name", "sweep.select")


def varying_settings(points: list[Point]) -> list[str]:
    """Which settings of the sweep itself its points disagree in; there should be none."""
    tables = [dict(leaves(point)) for point in points]
    return [key for key in _ONE_FOR_ALL if len({table[key] for table in tables}) > 1]


def name_variants(points: list[Point]) -> None:
    """Set every point's sweep.variant to the values in which it differs from others of its setup, method and init."""
    groups: dict[tuple[str, str, str], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.setup.name, point.method.name, point.init.name].append(point)
    for group in groups.values():
        tables = [dict(leaves(point)) for point in group]
        keys = [
            key
            for key in tables[0]
            if key.partition(".")[0] not in _NOT_VARIANTS and len({repr(table[key]) for table in tables}) > 1
        ]
        # A choice of group says it all: model.name stands for model.path and the rest.
        named = {key.partition(".")[0] for key in keys if key.endswith(".name") and key.count(".") == 1}
        shown = [key for key in keys if key.partition(".")[0] not in named or key == f"{key.partition('.')[0]}.name"]
        for point, table in zip(group, tables, strict=True):
            point.sweep.variant = " ".join(f"{key}={table[key]}" for key in shown)
