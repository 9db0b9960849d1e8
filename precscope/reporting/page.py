"""What the page's scripts work on: the view as JSON, sites as arrays in the order that sites.js reads them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..formats import format_names, get_format
from ..histogram import BINS, EXP_LO
from ..sites import Role
from .alike import pattern
from .courses import Course
from .downloads import downloads
from .prices import Price
from .rows import PlanRow, SiteRow
from .view import View

LIMITS = {"flushed": 0.01, "room": 2.0}
"""From which share a site is said to flush, and below how many binades of head-room to be tight."""
MANY = 5000
"""Sites from which a page opens with those alike as one row."""


def embed(content: Any) -> str:
    """JSON that may stand in a script element: `<`, `>`, `&` and all non-ASCII characters as \\u escapes."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def payload(view: View) -> dict[str, Any]:
    """What the page's scripts work on."""
    modules = list(dict.fromkeys(site.module for site in view.sites))
    named = [site.source for site in view.sites] + [p.source for site in view.sites for p in site.prices or ()]
    sources = list(dict.fromkeys(named))
    index = {name: i for i, name in enumerate(modules)}
    roles = [role.value for role in Role]
    scale = view.loss_scale.get("initial")
    present = {site.role for site in view.sites}
    texts: dict[str, int] = {}
    return {
        "bins": {"lo": EXP_LO, "count": BINS},
        "limits": LIMITS,
        "formats": [_format(name) for name in reversed(format_names())],
        "choice": {
            "format": view.format,
            "role": "output" if "output" in present else next((r for r in roles if r in present), "all"),
            "scale": round(math.log2(scale)) if scale and scale > 0 else 0,
            "alike": len(view.sites) > MANY,
        },
        "roles": roles,
        "modules": modules,
        "patterns": [pattern(name) for name in modules],
        "sources": sources,
        "steps": view.steps,
        "shadowSteps": view.shadow_steps,
        "sites": [_site(s, index[s.module], roles.index(s.role), sources) for s in view.sites],
        "plan": {place: _plan_row(row, texts) for place, row in _plans(view, index).items()},
        "reasons": list(texts),
        "baseline": view.baseline,
        "margin": None if view.margin is None else {"share": view.margin[0], "bound": view.margin[1]},
        "courses": [_course(c) for c in view.courses],
        "tables": [
            {"name": d.name, "says": d.says, "columns": d.columns, "rows": d.rows, "parquet": d.parquet,
             "size": d.size, "count": d.count} for d in downloads(view)
        ],
    }  # fmt: skip


def _format(name: str) -> dict[str, Any]:
    """A format as the scripts use it; those of no use as an answer (fp64) only place the grid of what was recorded."""
    fmt = get_format(name)
    return {
        "name": fmt.name, "p": fmt.precision, "emin": fmt.emin, "emax": fmt.emax, "max": fmt.max,
        "offered": fmt.bits <= 32, "overflowFrom": _finite(fmt.overflow_from), "atMidpoint": fmt.overflow_at_midpoint,
    }  # fmt: skip


def _site(site: SiteRow, module: int, role: int, sources: list[str]) -> list[Any]:
    """One site as an array; the history as hundredths of log2(amax)."""
    row = [
        module, role, site.call, site.count, site.zeros, site.nonfinite, site.amax, _finite(site.amin_nonzero),
        _finite(site.sumsq), sources.index(site.source), site.source_exponent, site.lo, site.histogram,
        [None if v is None else round(100 * math.log2(v)) for v in site.history], site.broken,
    ]  # fmt: skip
    return row if site.prices is None else [*row, [_price(p, sources.index(p.source)) for p in site.prices]]


def _price(price: Price, source: int) -> list[Any]:
    """As sites.js (readPrice) reads it, without what is 0 at the end; infinite weights as null."""
    weights = [_finite(float(f"{w:.7g}")) for w in price.weights]
    rounded = {fmt: float(f"{square:.7g}") for fmt, square in price.rounded.items() if math.isfinite(square)}
    row: list[Any] = [price.lo, weights, source, price.source_exponent, price.alone, rounded]
    while len(row) > 2 and not row[-1]:
        row.pop()
    return row


def _plans(view: View, index: dict[str, int]) -> dict[int, PlanRow]:
    """The plan's row of each module; of modules merged into one, the formats of all of them and their reasons."""
    found: dict[int, list[PlanRow]] = {}
    for row in view.plan:
        names = [row.module, *(pattern(row.module, n) for n in range(1, 9) if view.merged_from)]
        place = next((index[name] for name in names if name in index), None)
        if place is not None:
            found.setdefault(place, []).append(row)
    return {place: rows[0] if len(rows) == 1 else _together(rows) for place, rows in found.items()}


def _together(rows: list[PlanRow]) -> PlanRow:
    computes, params = (Counter(getattr(r, name) for r in rows).most_common() for name in ("compute", "params"))
    reasons = tuple(dict.fromkeys(reason for row in rows for reason in row.reasons[:1]))
    said = [", ".join(f"{f} ({n})" if len(found) > 1 else f for f, n in found) for found in (computes, params)]
    more = (f"and {len(reasons) - 3} more reasons",) if len(reasons) > 3 else ()
    return replace(rows[0], compute=said[0], params=said[1], reasons=(*reasons[:3], *more), evidence={})


def _plan_row(row: PlanRow, texts: dict[str, int]) -> list[Any]:
    """[compute, params, places of its reasons, evidence]; evidence: [how times are known, times in ms, loss noise, what
    is forbidden], each by format."""
    reasons = [texts.setdefault(reason, len(texts)) for reason in row.reasons]
    found = row.evidence
    times, noise = (_figures(found.get(name)) for name in ("time_ms", "loss_noise"))
    forbidden = [str(f) for f in found.get("forbidden") or ()]
    evidence = [str(found.get("time_from") or ""), times, noise, forbidden]
    return [row.compute, row.params, reasons, evidence] if any(evidence) else [row.compute, row.params, reasons]


def _figures(found: Any) -> dict[str, float]:
    """Figures by format, four digits."""
    if not isinstance(found, dict):
        return {}
    numbers = {str(f): v for f, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
    return {f: float(f"{v:.4g}") for f, v in numbers.items()}


def _course(course: Course) -> dict[str, Any]:
    """A run's series; losses with seven digits."""
    return {
        "run": course.run,
        "precision": course.precision,
        "seeds": course.seeds,
        "losses": [_digits(band) for band in course.losses],
        "difference": [_digits(band) for band in course.difference],
        "heldOut": [[s, _finite(v)] for s, v in course.held_out],
        "scale": [[s, _finite(v)] for s, v in course.scale],
        "rate": [_digits(point) for point in course.rate],
        "skipped": course.skipped,
        "nonfinite": course.nonfinite,
        "events": [[e.step, e.kind, e.action, e.module, e.text] for e in course.events],
    }


def _digits(point: Sequence[float | None]) -> list[float | None]:
    """(step, values ...) with seven digits, trailing unknown values left out."""
    step, *values = point
    said = [v if v is None else float(f"{v:.7g}") for v in values]
    while said and said[-1] is None and len(said) > 1:
        said.pop()
    return [step, *said]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
