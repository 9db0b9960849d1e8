"""What a user sees of a run: the HTML report, terminal tables, Markdown, notebook views. Needs no torch.

view.py gathers plain rows from a profile, a plan and runs; html, text and markdown render them, plotting draws some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from ..profiles import Profile

__all__ = ["report"]


def report(
    profile: Profile | str | Path,
    *,
    out: str | Path,
    plan: PrecisionPlan | str | Path | None = None,
    runs: Sequence[str | Path] = (),
    title: str | None = None,
) -> Path:
    """Write a self-contained HTML report of a recorded run to the file `out`, and return its path.

        ps.report("runs/a", plan=plan, runs=["runs/fp32", "runs/plan"], out="reports/a.html")

    profile: a Profile or its run directory. plan: a PrecisionPlan or its file. runs: directories of training runs to
    compare. title: heading of the page. Raises RunDirectoryError where a run cannot be read or `out` cannot be
    written, PlanError for a broken plan file.
    """
    from .html import write_report

    return write_report(profile, out=out, plan=plan, runs=runs, title=title)
