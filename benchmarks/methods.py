"""The losses over their two scores: `python -m benchmarks.methods`.

Prints the table of values for docs/methods.md and draws docs/images/methods.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.config.schema import CONF_DIR
from src.losses import LOSSES
from src.methods import COMPARED, METHODS
from sweeps.report.plot_style import KINDS, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

PAIR = (0.7, -0.4)  # scores of the table: chosen, rejected
BETAS = (1.0, 0.1)
SCORE_RANGE = 4.0  # of either score in the figure
FIGURE = Path("docs/images/methods.png")


def loss_options(method: str) -> dict[str, float]:
    """Return the options of a method's loss and their defaults in conf/method/."""
    configured = yaml.safe_load((CONF_DIR / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    return {name: configured[name] for name in METHODS[method].options}


def loss_and_gradients(method: str, chosen: Any, rejected: Any, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its derivatives by the chosen and the rejected score, float64, each of the scores' shape."""
    import torch

    scores = [torch.as_tensor(s, dtype=torch.float64).clone().requires_grad_() for s in (chosen, rejected)]
    loss = LOSSES[method](*scores, beta, **loss_options(method))
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), by_chosen, by_rejected


def table() -> str:
    """Return a table of the value and score gradients of every method at PAIR."""
    cells = ["method"]
    for beta in BETAS:
        cells += [f"loss, β = {beta:g}", "by chosen", "by rejected"]
    lines = [f"| {' | '.join(cells)} |", "|---|" + "---:|" * (len(cells) - 1)]
    for method, spec in METHODS.items():
        values = [v.item() for beta in BETAS for v in loss_and_gradients(method, *PAIR, beta)]
        lines.append(f"| {spec.name} | {' | '.join(f'{v:.6f}' for v in values)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Draw the methods that `method=all` compares over their two scores at beta = 1.

    Level lines of the loss, and where a gradient step moves.
    """
    from matplotlib.figure import Figure

    rows = [[m for m in COMPARED if METHODS[m].kind == kind] for kind in KINDS]
    columns = max(map(len, rows))
    fig = Figure(figsize=(2.75 * columns, 6.4), layout="constrained")
    grid = fig.subplots(len(rows), columns, squeeze=False)
    for axes, methods, kind in zip(grid, rows, KINDS, strict=True):
        for ax, method in zip(axes, methods, strict=False):
            _panel(ax, method)
        for ax in axes[len(methods) :]:
            ax.set_visible(False)
        axes[0].set_ylabel(f"{kind}\nscore of the rejected response")
    for ax in grid[-1]:
        ax.set_xlabel("score of the chosen response")
    fig.suptitle(
        "β = 1: level lines of the loss; arrows point down it, as long as the gradient (a scale of its own each)"
    )
    fig.savefig(path, dpi=150)


def _panel(ax: Axes, method: str) -> None:
    import torch

    # A mean log-prob is never positive.
    low, high = (-2 * SCORE_RANGE, 0.0) if METHODS[method].score == "mean_log_prob" else (-SCORE_RANGE, SCORE_RANGE)
    fine, coarse = torch.linspace(low, high, 201), torch.linspace(low, high, 12)[1:-1]
    values, _, _ = loss_and_gradients(method, *torch.meshgrid(fine, fine, indexing="xy"), 1.0)
    ax.contour(fine, fine, values, levels=12, colors="#bbbbbb", linewidths=0.8, linestyles="solid")
    chosen, rejected = torch.meshgrid(coarse, coarse, indexing="xy")
    _, by_chosen, by_rejected = loss_and_gradients(method, chosen, rejected, 1.0)
    longest = torch.hypot(by_chosen, by_rejected).max().item()
    step = (coarse[1] - coarse[0]).item()
    ax.quiver(
        chosen,
        rejected,
        -by_chosen,
        -by_rejected,
        color=STYLES[method][0],
        angles="xy",
        scale_units="xy",
        scale=longest / (1.3 * step),
        width=0.008,
        pivot="mid",
    )
    ax.plot([low, high], [low, high], ":", color="#555555", linewidth=1)
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set_title(f"{METHODS[method].name} ({METHODS[method].score.replace('_', ' ')})", fontsize=10)


def main() -> None:
    print(table())
    draw(FIGURE)


if __name__ == "__main__":
    main()
