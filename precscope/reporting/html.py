"""The HTML report: one self-contained file that works offline and answers what-if questions in the page.

Pictures are drawn by a few hundred lines of canvas and SVG code in templates/, so that the page weighs what its data
weigh. Data travel as JSON in a script element of type application/json, in which no character can end the element or
begin another; names reach the page as text only. A content security policy forbids every network request and every
script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import RunDirectoryError
from ..formats import format_names, get_format
from ..histogram import BINS, EXP_LO
from ..profiles import Profile
from ..sites import Role
from . import numbers
from .prices import Price
from .rows import SiteRow, group_rows
from .view import View, build_view

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("dom.js", "numbers.js", "answers.js", "charts.js", "map.js", "explorer.js", "main.js")
LIMITS = {"flushed": 0.01, "room": 2.0}
"""From which share a site is said to flush, and below how many binades of head-room to be tight."""


def write_report(
    profile: Profile | str | Path,
    *,
    out: str | Path,
    plan: PrecisionPlan | str | Path | None = None,
    runs: Sequence[str | Path] = (),
    title: str | None = None,
) -> Path:
    """Write the report of `profile` (a Profile or its run directory) to the file `out` and return its path.

    plan: a PrecisionPlan or its file. runs: directories of training runs to compare. title: heading of the page.
    Raises RunDirectoryError where a run cannot be read or `out` cannot be written, PlanError for a broken plan file.
    """
    view = build_view(profile, plan=plan, runs=runs, title=title)
    return save(render(view), out)


def save(text: str, out: str | Path) -> Path:
    """Write a report whole or not at all. Raises RunDirectoryError where it cannot be written."""
    from ..store import replacing

    path = Path(out)
    if path.is_dir():
        path = path / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write {path} ({error.strerror or error}): choose another file with out= (--out)"
        ) from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(view: View) -> str:
    """The page as text."""
    from markupsafe import Markup

    script = _script()
    groups = group_rows(view.plan)
    return _template().render(
        view=view,
        counted=any(row.flops_share for row in view.plan),
        modules_in=Counter(row.compute for row in view.plan),
        kept=[group for group in groups if not group.low],
        lowered=[group for group in groups if group.low],
        low_modules=sum(row.low for row in view.plan),
        version=__version__,
        css=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup("sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
        data=Markup(embed(payload(view))),
    )


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "figure", "percent", "raised", "bytes_text", "count_text", "plural"):
        environment.filters[name] = getattr(numbers, name)
    return environment.get_template("report.html.j2")


def _script() -> str:
    """All scripts of the page in one function scope; line endings as the browser will hash them."""
    parts = [(_TEMPLATES / name).read_text(encoding="utf-8").replace('"use strict";\n', "") for name in _SCRIPTS]
    body = "\n".join(parts).replace("\r\n", "\n")
    data = 'const DATA = JSON.parse(document.getElementById("data").textContent);'
    return f'(() => {{\n"use strict";\n{data}\n{body}\n}})();\n'


def embed(content: Any) -> str:
    """JSON that may stand in a script element: `<`, `>`, `&` and all non-ASCII characters as \\u escapes."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def payload(view: View) -> dict[str, Any]:
    """What the page's scripts work on. Sites are arrays, in the order that explorer.js (readSite) reads them."""
    modules = list(dict.fromkeys(site.module for site in view.sites))
    named = [site.source for site in view.sites] + [p.source for site in view.sites for p in site.prices or ()]
    sources = list(dict.fromkeys(named))
    index = {name: i for i, name in enumerate(modules)}
    roles = [role.value for role in Role]
    scale = view.loss_scale.get("initial")
    present = {site.role for site in view.sites}
    return {
        "bins": {"lo": EXP_LO, "count": BINS},
        "limits": LIMITS,
        "formats": [_format(name) for name in reversed(format_names())],
        "choice": {
            "format": view.format,
            "role": "output" if "output" in present else next((r for r in roles if r in present), "all"),
            "scale": round(math.log2(scale)) if scale and scale > 0 else 0,
        },
        "roles": roles,
        "modules": modules,
        "sources": sources,
        "steps": view.steps,
        "shadowSteps": view.shadow_steps,
        "sites": [_site(s, index[s.module], roles.index(s.role), sources) for s in view.sites],
        "plan": {index[r.module]: [r.compute, r.params, r.reasons] for r in view.plan if r.module in index},
        "baseline": view.baseline,
        "curves": [
            {
                "run": c.run,
                "precision": c.precision,
                "steps": c.steps,
                "losses": [x if x is None else float(f"{x:.7g}") for x in c.losses],
            }
            for c in view.curves
        ],
    }


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
    """As explorer.js (readPrice) reads it, without what is 0 at the end; infinite weights as null."""
    weights = [_finite(float(f"{w:.7g}")) for w in price.weights]
    rounded = {fmt: float(f"{square:.7g}") for fmt, square in price.rounded.items() if math.isfinite(square)}
    row = [price.lo, weights, source, price.source_exponent, price.alone, rounded]
    while len(row) > 2 and not row[-1]:
        row.pop()
    return row


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
