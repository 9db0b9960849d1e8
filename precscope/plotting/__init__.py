"""Static figures for papers and slides, reached as `ps.plot`: PNG and SVG through matplotlib (extra `figures`).

    import precscope as ps
    ax = ps.plot.range_map(ps.Profile.load("runs/a"), role="grad_output")
    ax.figure.savefig("ranges.svg")

Each function draws on `ax` where one is given (figures of several panels take as many Axes as they are given), makes a
figure where not, and returns what it drew on: one Axes, or an array of them. Nothing is saved or shown. Colours are
safe for the colour-blind, and shape, hatching or dashes say the same in print. No torch.

`save_all` writes every figure that a run has something for.
"""

from __future__ import annotations

from .budgets import noise_budget
from .choices import plan
from .formats import what_if
from .over_steps import history
from .pages import save, save_all
from .ranges import histogram, range_map
from .runs import comparison, loss, loss_scale, speed

__all__ = [
    "comparison",
    "histogram",
    "history",
    "loss",
    "loss_scale",
    "noise_budget",
    "plan",
    "range_map",
    "save",
    "save_all",
    "speed",
    "what_if",
]
