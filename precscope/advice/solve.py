"""The assignment as a mixed-integer linear program (scipy.optimize.milp, HiGHS).

minimise    sum_u sum_f cost[u, f] x[u, f]  +  sum_edges cast[e] d[e]
subject to  sum_f x[u, f] = 1                     each unit has one format
            x[u, f] = 0                           where f is forbidden for u
            x[u, f] = x[v, f]                     where u and v must agree
            d[e] >= x[a, f] - x[b, f]             for each format f of the edge a -> b: d is 1 where they differ
            sum_u sum_f noise[u, f] x[u, f] <= budget
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError


@dataclass(frozen=True)
class Problem:
    """units, formats: names. cost: float[U, F] in ms. allowed: bool[U, F]. edges: (unit index, unit index, ms of one
    cast). groups: unit indices that must agree. noise: float[U, F] or None, variances whose sum is at most budget;
    where no assignment is as quiet as that, the quietest is taken."""

    units: Sequence[str]
    formats: Sequence[str]
    cost: np.ndarray
    allowed: np.ndarray
    edges: Sequence[tuple[int, int, float]] = ()
    groups: Sequence[Sequence[int]] = ()
    noise: np.ndarray | None = None
    budget: float = np.inf


@dataclass(frozen=True)
class Solution:
    """choice: unit -> format. time_ms: predicted time of the units and casts; casts: edges whose formats differ."""

    choice: Mapping[str, str]
    time_ms: float
    casts: int


def solve(
    problem: Problem, time_ms: Mapping[tuple[str, str], float] | None = None, *, time_limit_s: float = 20.0
) -> Solution:
    """Solve the program. time_ms: (unit, format) -> predicted time, where `problem.cost` holds more than that.

    Raises UsageError where a unit has no allowed format or a group no common one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    u, f, e = len(problem.units), len(problem.formats), len(problem.edges)
    _check(problem)
    cost = np.concatenate([problem.cost.ravel(), [ms for *_, ms in problem.edges]])
    upper = np.concatenate([problem.allowed.ravel().astype(float), np.ones(e)])
    rows, lower = _constraints(problem)
    i, j, v = (np.asarray(c) for c in zip(*rows, strict=True))
    matrix = coo_array((v, (i, j)), shape=(len(lower), u * f + e)).tocsr()
    matrix, lower = _with_noise(problem, matrix, lower)
    lo = np.asarray([a for a, _ in lower])
    hi = np.asarray([b for _, b in lower])
    result = milp(
        cost,
        integrality=np.concatenate([np.ones(u * f), np.zeros(e)]),
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, lo, hi),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
    )
    if result.x is None:
        raise UsageError(
            f"no assignment satisfies all constraints ({result.message}): allow fp32, or loosen the limits"
        )
    chosen = result.x[: u * f].reshape(u, f).argmax(1)
    choice = {name: problem.formats[c] for name, c in zip(problem.units, chosen, strict=True)}
    differ = [chosen[a] != chosen[b] for a, b, _ in problem.edges]
    units = (
        problem.cost[np.arange(u), chosen].sum() if time_ms is None else sum(time_ms[pair] for pair in choice.items())
    )
    time = units + sum(ms for (_, _, ms), d in zip(problem.edges, differ, strict=True) if d)
    return Solution(choice, float(time), int(sum(differ)))


def _with_noise(
    problem: Problem, matrix: Any, lower: list[tuple[float, float]]
) -> tuple[Any, list[tuple[float, float]]]:
    """The row of the noise budget, in units of the budget, where it binds at all."""
    from scipy.sparse import csr_array, vstack

    noise = problem.noise
    if noise is None or not np.isfinite(problem.budget):
        return matrix, lower
    allowed = np.where(problem.allowed, noise, np.inf)
    budget = max(problem.budget, float(allowed.min(1).sum()) * (1 + 1e-6))
    if np.where(problem.allowed, noise, 0.0).max(1).sum() <= budget:
        return matrix, lower
    row = np.concatenate([(noise / budget).ravel(), np.zeros(len(problem.edges))])
    return vstack([matrix, csr_array(row[None, :])]).tocsr(), [*lower, (-np.inf, 1.0)]


def _check(problem: Problem) -> None:
    for name, row in zip(problem.units, problem.allowed, strict=True):
        if not row.any():
            raise UsageError(
                f"every one of {', '.join(problem.formats)} is forbidden for {name or '(root)'}: "
                "add fp32 to formats= (--formats)"
            )
    for group in problem.groups:
        if not problem.allowed[list(group)].all(0).any():
            names = ", ".join(problem.units[i] for i in group)
            raise UsageError(f"no format is allowed for all of {names}, which must agree: add fp32 to formats=")


def _constraints(problem: Problem) -> tuple[list[tuple[int, int, float]], list[tuple[float, float]]]:
    """Sparse entries (row, column, value) and each row's (lower, upper)."""
    u, f = len(problem.units), len(problem.formats)
    rows: list[tuple[int, int, float]] = []
    bounds: list[tuple[float, float]] = []

    def add(entries: list[tuple[int, float]], lower: float, upper: float) -> None:
        rows.extend((len(bounds), column, value) for column, value in entries)
        bounds.append((lower, upper))

    for unit in range(u):
        add([(unit * f + k, 1.0) for k in range(f)], 1, 1)
    for group in problem.groups:
        for other in group[1:]:
            for k in range(f):
                add([(group[0] * f + k, 1.0), (other * f + k, -1.0)], 0, 0)
    for e, (a, b, _) in enumerate(problem.edges):
        for k in range(f):
            add([(u * f + e, 1.0), (a * f + k, -1.0), (b * f + k, 1.0)], 0, np.inf)
    return rows, bounds
