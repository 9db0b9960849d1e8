"""The casts that a plan makes on a model's graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .model import PrecisionPlan


@dataclass(frozen=True)
class Cast:
    """A tensor that changes its format on the way from `producer` to `consumer`."""

    producer: str
    consumer: str
    before: str
    after: str


def casts(plan: PrecisionPlan, edges: Iterable[tuple[str, str]]) -> list[Cast]:
    """The edges (producer, consumer: module names) whose ends compute in different formats; `len` counts them.
    tf32 counts as fp32: its tensors are fp32."""
    edges = list(edges)
    compute = {n: p.compute.replace("tf32", "fp32") for n, p in plan.resolve({n for e in edges for n in e}).items()}
    return [Cast(a, b, compute[a], compute[b]) for a, b in edges if compute[a] != compute[b]]
