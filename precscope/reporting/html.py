"""The HTML report: one self-contained file that works offline and answers what-if questions in the page.

Pictures are drawn by a few hundred lines of canvas and SVG code in templates/, so that the page weighs what its data
weigh. Data travel as JSON in a script element of type application/json, in which no character can end the element or
begin another; names reach the page as text only. A content security policy forbids every network request and every
script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import RunDirectoryError
from ..profiles import Profile
from . import numbers
from .page import LIMITS, MANY, embed, payload
from .rows import group_rows
from .view import View, build_view

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

TEMPLATES = Path(__file__).parent / "templates"
"""Folder of the pages' templates and of their style sheet."""

_SCRIPTS = (
    "dom.js", "numbers.js", "answers.js", "charts.js", "sites.js", "map.js", "growth.js", "detail.js", "explorer.js",
    "training.js", "tables.js", "main.js",
)  # fmt: skip
_EVENTS, _GROUPS = 40, 150
"""Events and groups of modules that the page lists; its table view has all."""

__all__ = ["LIMITS", "TEMPLATES", "embed", "environment", "payload", "render", "save", "write_report"]


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
    events = [(course.run, event) for course in view.courses for event in course.events]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            view=view,
            counted=any(row.flops_share for row in view.plan),
            modules_in=Counter(row.compute for row in view.plan),
            kept=[group for group in groups if not group.low][:_GROUPS],
            lowered=[group for group in groups if group.low][:_GROUPS],
            more_groups=sum(max(sum(g.low is low for g in groups) - _GROUPS, 0) for low in (False, True)),
            events=events[-_EVENTS:],
            more_events=max(len(events) - _EVENTS, 0),
            several=any(course.seeds > 1 for course in view.courses),
            held_out=any(len(course.held_out) > 1 for course in view.courses),
            alike=len(view.sites) > MANY,
            low_modules=sum(row.low for row in view.plan),
            version=__version__,
            css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=Markup("sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
            data=Markup(embed(payload(view))),
        )
    )


@lru_cache(maxsize=1)
def environment() -> Any:
    """jinja2 for the pages: what is inserted is escaped, a name that is not there is an error, numbers have filters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "figure", "percent", "raised", "bytes_text", "count_text", "plural"):
        made.filters[name] = getattr(numbers, name)
    return made


def _script() -> str:
    """All scripts of the page in one function scope; line endings as the browser will hash them."""
    parts = [(TEMPLATES / name).read_text(encoding="utf-8").replace('"use strict";\n', "") for name in _SCRIPTS]
    body = "\n".join(parts).replace("\r\n", "\n")
    data = 'const DATA = JSON.parse(document.getElementById("data").textContent);'
    return f'(() => {{\n"use strict";\n{data}\n{body}\n}})();\n'
