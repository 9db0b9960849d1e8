"""Where a report's numbers come from: versions, device, seeds, command line, settings, schema numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import __version__
from ..profiles import Profile
from ..store import SCHEMA, this_command
from .courses import run_names
from .downloads import SCHEMA as TABLES
from .numbers import number

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..plans import PrecisionPlan

Pairs = tuple[tuple[str, str], ...]

_RUN = (
    "task",
    "model",
    "parameters",
    "precision",
    "status",
    "error",
    "seed",
    "seeds",
    "started",
    "finished",
    "command",
)
_MACHINE = ("device", "device_name", "threads", "precscope", "torch", "python")
_COMPARED = ("directory", "precision", "status", "error", "seed", "seeds", "steps", "resumed_from", "started",
             "finished", "command", "note", "device", "device_name", "precscope", "torch", "python",
             "schema")  # fmt: skip
_HIDDEN = ("pid", "schema", "result", "rank")


def provenance(
    profile: Profile, plan: PrecisionPlan | None, comparison: Comparison | None = None
) -> tuple[tuple[str, Pairs], ...]:
    """(heading, ((key, value), ...)) for everything known of how the run, the plan and the runs compared were made."""
    run = dict(profile.run)
    steps = profile.steps
    what = [("run directory", str(profile.path)), *_pick(run, _RUN)]
    if steps:
        what.append(("recorded steps", f"{len(steps)}, from {steps[0]} to {steps[-1]}"))
    if profile.damaged:
        what.append(("parts left out, damaged", ", ".join(profile.damaged)))
    sections = [("Run", tuple(what)), ("Machine and versions", tuple(_pick(run, _MACHINE)))]
    train = run.pop("train", None)
    if isinstance(train, dict):
        sections.append(("Training settings", tuple(_flat(train))))
    rest = {k: v for k, v in run.items() if k not in {*_RUN, *_MACHINE, *_HIDDEN}}
    sections.append(("Recording and result", tuple(_flat(rest))))
    if plan is not None:
        sections.append(("Plan made from", tuple(_flat(dict(plan.made_from or {})))))
    schemas = [
        ("run.json", profile.run.get("schema")),
        ("stats parts", SCHEMA),
        ("graph.json", profile.graph.get("schema")),
    ]
    if plan is not None:
        schemas.append(("plan.json", getattr(plan, "schema_number", None) or getattr(plan, "schema", None)))
    schemas.append(("tables of this page", TABLES))
    known = tuple((k, str(v)) for k, v in schemas if isinstance(v, int | str))
    sections.append(("This report", (("precscope", __version__), ("command", this_command()))))
    return tuple(s for s in [*sections, *_compared(comparison), ("Schema numbers", known)] if s[1])


def _compared(comparison: Comparison | None) -> list[tuple[str, Pairs]]:
    """A section per training run: what made it."""
    if comparison is None:
        return []
    sections = []
    for name, group in zip(run_names(comparison), comparison.groups, strict=True):
        about = {**group.run.about, "directory": str(group.run.path)}
        if len(group.seeds) > 1:
            about["seeds"] = sorted(group.seeds)
        sections.append((f"Run compared: {name}", tuple(_pick(about, _COMPARED))))
    return sections


def _pick(content: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(k.replace("_", " "), _text(content[k])) for k in keys if content.get(k) not in (None, "", [], {})]


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for number, one in enumerate(value, 1):
                pairs += _flat(one, f"{prefix}{key}.{number}." if len(value) > 1 else f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            pairs.append((name, _text(value)))
    return pairs


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        most = 6 if all(isinstance(v, str) for v in value) else 40
        text = ", ".join(_text(v) for v in value[:most])
        return text + (f" and {len(value) - most} more" if len(value) > most else "")
    return str(value)
