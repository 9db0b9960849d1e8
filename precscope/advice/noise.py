"""What rounding costs in loss noise, and how much of it training would not notice.

Rounding a tensor changes the loss by a random amount, whose standard deviation the shadow steps have priced. Training
has noise of its own, the spread of the loss over minibatches: the budget is a share of that. Variances add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..formats import get_format
from ..profiles import Profile
from ..sites import Role
from .loss_scale import largest_scale
from .units import ModelGraph

_LEAST_SHARE = 1e-3  # of the loss: noise below it is no matter, however quiet the batches are


@dataclass(frozen=True)
class Noise:
    """variance: (unit, format) -> variance of the loss by rounding what the unit makes, and what it multiplies; 0 for
    fp32. budget: the largest sum of variances, inf where nothing is known. spread: standard deviation of the loss over
    minibatches, NaN where not known."""

    variance: dict[tuple[str, str], float] = field(default_factory=dict)
    budget: float = float("inf")
    spread: float = float("nan")

    @property
    def known(self) -> bool:
        """Whether the run has prices and a budget."""
        return bool(self.variance) and np.isfinite(self.budget)

    def of(self, unit: str, fmt: str) -> float:
        """Variance of a unit in a format."""
        return self.variance.get((unit, fmt), 0.0)

    def std(self, choice: dict[str, str]) -> float:
        """Standard deviation of the loss under an assignment."""
        return float(np.sqrt(sum(self.of(u, f) for u, f in choice.items())))

    @classmethod
    def of_run(cls, profile: Profile, graph: ModelGraph, formats: Sequence[str], *, share: float) -> Noise:
        """From the shadow steps of a run and its training log. share: of the spread, for the standard deviation."""
        if profile.shadow is None:
            return cls()
        spread, level = _spread(profile)
        if not level > 0:
            return cls()
        budget = max(share * spread if spread == spread else 0.0, _LEAST_SHARE * level) ** 2
        return cls(_variances(profile, graph, formats), budget, spread)


def _variances(profile: Profile, graph: ModelGraph, formats: Sequence[str]) -> dict[tuple[str, str], float]:
    """An input is another module's output and is priced there; a weight only where it is multiplied."""
    units = {u.name: u for u in graph.units}
    shadow = profile.shadow
    assert shadow is not None
    found: dict[tuple[str, str], float] = {}
    for name in formats:
        fmt = get_format(name)
        if fmt.bits >= 32 or name == "tf32":
            continue
        if fmt.bits > 8:
            asked = profile.ask(fmt, roles=("output", "weight"))
            rows = zip(asked.module, asked.role, asked.loss_noise, strict=True)
        else:  # each 8-bit tensor has a scale of its own
            scale = np.asarray([largest_scale(a, fmt) if a > 0 else 0 for a in shadow.table.amax], np.int64)
            noise = shadow.table.ask(fmt, scale_exponent=scale)["loss_noise"]
            rows = zip([s.module for s in shadow.sites], [s.role.value for s in shadow.sites], noise, strict=True)
        for module, role, noise in rows:
            unit = units.get(module)
            counted = role == Role.OUTPUT.value or (role == Role.WEIGHT.value and unit is not None and unit.matmul)
            if unit is not None and counted and noise == noise and (unit.leaf or role == Role.WEIGHT.value):
                found[module, name] = found.get((module, name), 0.0) + float(noise) ** 2
    return found


def _spread(profile: Profile) -> tuple[float, float]:
    """(standard deviation of the loss from batch to batch, its size), without the trend of training: from second
    differences, whose variance is six times that of independent noise."""
    train = profile.train
    losses = np.asarray(train.loss, float) if train is not None and "loss" in train else np.zeros(0)
    losses = losses[np.isfinite(losses)]
    if len(losses) < 1:
        return float("nan"), float("nan")
    level = float(np.abs(losses[-max(1, len(losses) // 4) :]).mean())
    if len(losses) < 6:
        return float("nan"), level
    return float(np.sqrt(np.mean(np.diff(losses, 2) ** 2) / 6)), level
