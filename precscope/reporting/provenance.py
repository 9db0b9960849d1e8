"""Where a report's numbers come from: versions, device, seeds, command line, settings, schema numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..profiles import Profile
from ..store import SCHEMA
from .numbers import number

if TYPE_CHECKING:
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
_HIDDEN = ("pid", "schema", "result", "rank")


def provenance(profile: Profile, plan: PrecisionPlan | None) -> tuple[tuple[str, Pairs], ...]:
    """(heading, ((key, value), ...)) for everything known of how the run and the plan were made."""
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
    known = tuple((k, str(v)) for k, v in schemas if isinstance(v, int | str))
    return tuple(s for s in [*sections, ("Schema numbers", known)] if s[1])


def _pick(content: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(k.replace("_", " "), _text(content[k])) for k in keys if content.get(k) not in (None, "", [], {})]


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
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
        text = ", ".join(_text(v) for v in value[:40])
        return text + (f" and {len(value) - 40} more" if len(value) > 40 else "")
    return str(value)
