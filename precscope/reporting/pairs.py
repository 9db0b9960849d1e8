"""What a comparison says of each run against the baseline, as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .text import line_width

if TYPE_CHECKING:
    from ..comparison import Against


def pairs_text(pairs: Sequence[Against], *, margin: float, confidence: float, width: int | None = None) -> str:
    """A paragraph per run: verdict, what it rests on, speed, memory, trouble. "" without a run but the baseline."""
    from ..comparison.wording import percentage

    if not pairs:
        return ""
    width = line_width(width)
    head = (
        f"against {pairs[0].baseline}: margin {percentage(margin)} of its loss, confidence {percentage(confidence)}; "
        "brackets: intervals over seeds"
    )
    lines = textwrap.wrap(head, width)
    for pair in pairs:
        lines += textwrap.wrap(f"{pair.run}: {pair.verdict}", width, subsequent_indent="  ", break_on_hyphens=False)
        for text in _details(pair):
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _details(pair: Against) -> list[str]:
    from ..comparison.wording import evidence, judged

    if pair.kind == "incomparable":
        return []
    said = []
    if pair.why_unpaired:
        said.append(f"not paired: {pair.why_unpaired}")
    loss = pair.loss
    if loss is not None and "diverged" in pair.kind:
        said.append(f"the {loss.sizes[0]} that did not diverge: {judged(loss)}")
    said.append(evidence(pair))
    said += [_curve(pair), _running(pair), *pair.notes]
    return [text for text in said if text]


def _curve(pair: Against) -> str:
    from ..comparison.wording import between, percentage, signed

    curve = pair.curve
    if curve is None:
        return ""
    interval = f", {percentage(curve.confidence)} interval {between(curve, curve.interval)}" if curve.df else ""
    return f"training loss step by step, last tenth: {signed(curve.share)}{interval}"


def _running(pair: Against) -> str:
    """Speed, memory, skipped and non-finite steps, the guard's events."""
    from ..comparison.wording import speed_text

    parts = [f"speed {speed_text(pair.speed)}"]
    if pair.memory == pair.memory:
        parts.append(f"memory {pair.memory:.2f}x")
    for word, (mine, theirs) in (("skipped", pair.skipped), ("non-finite", pair.nonfinite)):
        if mine or theirs:
            parts.append(f"{word} {mine} of {pair.steps} steps (baseline {theirs})")
    if pair.events:
        parts.append("guard: " + ", ".join(f"{count} {kind}" for kind, count in pair.events.items()))
    return "; ".join(parts)
