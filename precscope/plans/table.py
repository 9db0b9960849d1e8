"""A plan's entries as rows of text: siblings share a row, long names and reasons are shortened."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .layers import LayerPrecision, Reason
from .mistakes import short

if TYPE_CHECKING:
    from .model import PrecisionPlan

_WIDTH = 80


def text_of(plan: PrecisionPlan, *, width: int = _WIDTH) -> str:
    """The plan in lines of at most `width` characters (60 or more): status, default, loss scale, phases, then a row per
    entry."""
    counts = ", ".join(f"{fmt} {n}" for fmt, n in plan.counts().most_common())
    lines = [f"precision plan ({plan.status}); default: {plan.default}; entries: {counts or 'none'}"]
    if plan.loss_scale:
        lines.append("loss scale: " + ", ".join(f"{k} {short(v)}" for k, v in plan.loss_scale.items()))
    for phase in plan.phases:
        lines.append(f"from step {phase.from_step}: {phase.precision or (phase.plan and phase.plan.default)}")
    if plan.confirmed:
        lines.append(confirmation_of(plan.confirmed))
    lines = [line for long in lines for line in textwrap.wrap(long, width, subsequent_indent="  ")]
    return "\n".join([*lines, *_lines(_rows(plan), width=width)])


def confirmation_of(confirmed: dict[str, Any]) -> str:
    """What a confirmation found, in a sentence. Keys that a plan from elsewhere lacks are left out."""
    passed, score = confirmed.get("passed", True), confirmed.get("score")
    text = "confirmed" if passed else "NOT confirmed"
    if "batches" in confirmed:
        n, states = confirmed["batches"], confirmed.get("states", ())
        text += f" on {n} batch{'es' if n != 1 else ''} that {'were' if n != 1 else 'was'} not recorded"
        text += ", as the model stands and after some training" if len(states) > 1 else ""
    if confirmed.get("worst"):
        part = f"{score:.0%} of what is tolerated" if score is not None else "not tolerable"
        text += f"; the worst is {part}: {confirmed['worst']}"
    trial = confirmed.get("trial")
    if trial:
        text += f"; {trial['steps']} training steps end at a loss of {trial['loss_plan']:.4g}, fp32 at "
        text += f"{trial['loss_fp32']:.4g}" + (f", {trial['skipped']} skipped" if trial.get("skipped") else "")
    return text


def plan_lines(plan: PrecisionPlan) -> list[tuple[str, str, str]]:
    """(modules, precision, first reason) of the default and of each row."""
    return [("default", str(plan.default), _first_reason([plan.default])), *_rows(plan)]


def _rows(plan: PrecisionPlan) -> list[tuple[str, str, str]]:
    """(modules, precision, first reason), siblings that differ only in one number in one row."""
    groups = _group_siblings(plan.modules)
    return [(name or "(root)", str(layers[0]), _first_reason(layers)) for name, layers in groups]


def _first_reason(layers: Sequence[LayerPrecision]) -> str:
    return next((str(layer.reasons[0]) for layer in layers if layer.reasons), "")


def _group_siblings(modules: dict[str, LayerPrecision]) -> list[tuple[str, list[LayerPrecision]]]:
    """Entries of equal precision whose names differ in one number share a row: blocks.0.fc, blocks.1.fc, blocks.4.fc
    become blocks.{0-1,4}.fc. The first number is the one that varies; order is that of the first of each group."""
    groups: dict[Any, list[tuple[int, LayerPrecision]]] = {}
    for name, layer in modules.items():
        match = re.fullmatch(r"(|.*?\.)(\d+)((?:\..*)?)", name)
        code = layer.reasons[0].code if layer.reasons and isinstance(layer.reasons[0], Reason) else ""
        key = (match[1], match[3], layer.precision, code) if match else name
        groups.setdefault(key, []).append((int(match[2]) if match else -1, layer))
    named = []
    for key, members in groups.items():
        name = key if isinstance(key, str) else f"{key[0]}{_ranges([i for i, _ in members])}{key[1]}"
        named.append((name, [layer for _, layer in members]))
    return named


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; a single number stays bare."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) + "}"


def _lines(rows: list[tuple[str, str, str]], *, width: int) -> list[str]:
    """Three columns in `width` characters; reasons wrap to two lines, those that forbid a format ("not fp16: ...") to
    as many as they need; long names lose their middle."""
    if not rows:
        return []
    second = max(len("precision"), *(len(p) for _, p, _ in rows))
    first = min(max(len("modules"), *(len(n) for n, _, _ in rows)), 34)
    rest = width - first - second - 4
    lines = ["", f"{'modules':<{first}}  {'precision':<{second}}  why".rstrip(), "-" * width]
    for name, precision, why in rows:
        if len(name) > first:
            name = name[: first // 2 - 1] + "..." + name[len(name) - first + first // 2 + 2 :]
        most = None if why.startswith(("not ", "params ")) else 2
        said = textwrap.wrap(why, rest, max_lines=most, placeholder=" ...") or [""]
        lines.append(f"{name:<{first}}  {precision:<{second}}  {said[0]}".rstrip())
        lines += [" " * (first + second + 4) + more for more in said[1:]]
    return lines
