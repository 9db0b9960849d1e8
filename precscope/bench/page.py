"""The zoo's page: what was cured, what was named and why, as one self-contained file for a colleague.

The page has the style of the reports and no script; folding and printing are the browser's own.
"""

from __future__ import annotations

import ast
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.html import TEMPLATES, environment, save
from ..reporting.numbers import percent, plural
from ..store import this_command
from .cases import FORMATS, Case, load_cases
from .scoring import LARGEST_SHARE, Score

if TYPE_CHECKING:
    from .zoo import ZooResult

_WORDS = {"cured": "fits", "quiet": "fits", "loud": "tight", "not named": "tight"}  # any other verdict is a failure
_MODES = {
    "autocast": "autocast; fp16 with a loss scale",
    "pure": "weights, buffers and inputs in the format, no loss scale",
}


def save_page(result: ZooResult, out: str | Path) -> Path:
    """Write the page of `result` whole or not at all; its path. The case files must still be where they were scored.

    Raises RunDirectoryError where `out` cannot be written, TaskError where the cases cannot be read.
    """
    return save(render(result), out)


def render(result: ZooResult) -> str:
    """The page as text."""
    import torch
    from markupsafe import Markup

    from .. import __version__
    from .zoo import SCHEMA

    total = result.summary
    cases = load_cases(result.folder, sorted({s.case for s in result.scores}))
    rows = [_row(case, [s for s in result.scores if s.case == case.name]) for case in cases]
    return environment().get_template("zoo.html.j2").render(
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        lead=_lead(result),
        total=total,
        share=percent(total.share) if total.failing else "",
        limit=percent(LARGEST_SHARE),
        groups=[
            (title, text, [r for r in rows if r["control"] is control])
            for title, text, control in (
                ("Failures", "Each trains in fp32 and fails in a format that is cured here, or was to be.", False),
                ("Look-alikes", "Nothing is wrong with them; advice that forbids what looks alike fails here.", True),
            )
        ],
        missing=total.missing,
        doubtful=[f"{s.case} {s.format}" for s in result.scores if s.low_fails != s.failing],
        facts={
            "command": this_command(),
            "cases": Path(result.folder).name,
            "schema": SCHEMA,
            "precscope": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "seed": result.seed,
            "seconds": round(result.seconds),
        },
        version=__version__,
    )  # fmt: skip


def _lead(result: ZooResult) -> str:
    total, parts = result.summary, []
    if total.failing:
        pairs = plural(total.failing, "pair")
        parts.append(
            f"Of {pairs} of a model and a format in which it fails, precscope's advice cures {total.cured}, naming the "
            f"module at fault, and keeps {percent(total.share)}% of the other layers out of the format needlessly"
        )
    if total.passing:
        parts.append(f"of {plural(total.passing, 'pair')} in which nothing is wrong it leaves {total.quiet} alone")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _row(case: Case, scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "name": case.name,
        "control": case.is_control,
        "about": " ".join((ast.get_docstring(ast.parse(case.path.read_text(encoding="utf-8"))) or "").split()),
        "guilty": [(f, case.guilty[f]) for f in FORMATS if case.guilty[f]],
        "recipe": f"{_MODES[case.mode]}; " + (plural(case.steps, "step") if case.steps else "inference"),
        "source": case.source,
        "fix": case.fix,
        "good": all(s.good for s in scores),
        "pairs": [_pair(s) for s in scores],
    }


def _pair(score: Score) -> dict[str, Any]:
    reasons = [(name or "(whole model)", name in score.needless, why) for name, why in score.high.items()]
    return {
        "format": score.format,
        "failing": score.failing,
        "ends": (score.fp32, score.low, "error" if score.error else score.planned),
        "high": f"{score.high_leaves} of {score.leaves}" if score.error is None else "",
        "word": score.verdict,
        "kind": _WORDS.get(score.verdict, "overflows"),
        "reasons": reasons,
        "error": score.error,
    }
