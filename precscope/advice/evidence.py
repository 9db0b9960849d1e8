"""What a run recorded about the tensors that a model keeps: updates, optimizer state, settings, per step. No torch.

Rows of role "state" with call index 1, whose tensor ends in .swallowed_<format>, .stuck_<format> or .grad, are the
recorder's own (see recording/wholestep.py and updates.py); those with call index 0 are state of optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..formats import FloatFormat
from ..histogram import rounding_table
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site

_DERIVED = 1
_HISTORY = ("step", "count", "zeros", "amax", "sum", "sumsq", "loss_scale")


@dataclass(frozen=True)
class Stuck:
    """share: of the elements that are 2 ulps or more from where storage would have left them. ulps: rms of those.
    ulps_ahead: what those become, on average, where the distance has grown steadily; else 0."""

    share: float
    ulps: float
    ulps_ahead: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A reason against storing a unit's tensors low. badness: the worst of each code is told."""

    unit: str
    badness: float
    reason: Reason


class Evidence:
    """A profile, indexed by tensor."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.index = {site: i for i, site in enumerate(profile.sites)}
        self.span = profile.steps[-1] + 1 if profile.steps else 0
        self._by_role: dict[Role, tuple[Any, dict[Site, slice]]] = {}

    def row(self, site: Site, role: Role, tensor: str | None = None) -> int | None:
        """The row of another role (and tensor) of the same module, None where there is none."""
        return self.index.get(Site(site.module, role, 0, site.tensor if tensor is None else tensor))

    def updated(self) -> Iterator[Site]:
        """Sites of role update: the tensors that some step changed, or tried to."""
        return (s for s in self.profile.sites if s.role is Role.UPDATE)

    def states(self) -> Iterator[Site]:
        """Sites of what optimizers keep."""
        return (s for s in self.profile.sites if s.role is Role.STATE and s.call != _DERIVED)

    def summed(self) -> Iterator[Site]:
        """Parameters whose gradient was looked at under way to its sum, as sites of role weight."""
        ending = ".grad"
        for s in self.profile.sites:
            if s.role is Role.STATE and s.call == _DERIVED and s.tensor.endswith(ending):
                yield Site(s.module, Role.WEIGHT, 0, s.tensor.removesuffix(ending))

    @cached_property
    def knows_swallowed(self) -> bool:
        """Whether the run was recorded with the rows of wholestep.py."""
        return "optimizers" in self.profile.run or any(
            s.role is Role.STATE and s.call == _DERIVED for s in self.profile.sites
        )

    def history(self, site: Site) -> Any:
        """The rows of one site over steps (empty where there are none), a DataFrame with the columns _HISTORY."""
        if site.role not in self._by_role:
            self._by_role[site.role] = self._read(site.role)
        rows, where = self._by_role[site.role]
        return rows.iloc[where.get(site, slice(0, 0))]

    def _read(self, role: Role) -> tuple[Any, dict[Site, slice]]:
        """(the rows of one role, site after site; where each site's are). Roles are read when they are asked for: in a
        long run of a large model each has millions of rows."""
        keys = ["module", "call", "tensor"]
        rows = self.profile.history((*keys, *_HISTORY), roles=[role.value])
        number = rows.groupby(keys, observed=True, sort=False).ngroup().to_numpy()
        order = np.argsort(number, kind="stable")
        starts = np.flatnonzero(np.diff(number[order], prepend=-1))
        ends = [*starts[1:].tolist(), len(order)][: len(starts)]
        first = rows.iloc[order[starts]]
        names = zip(first.module, first.call, first.tensor, strict=True)
        where = {
            Site(m, role, int(c), t): slice(a, b) for (m, c, t), a, b in zip(names, starts.tolist(), ends, strict=True)
        }
        return rows[list(_HISTORY)].iloc[order], where

    def _times(self, index: int) -> int:
        """In how many steps a site was recorded."""
        times = self.profile.times
        return len(self.history(self.profile.sites[index])) if times is None else int(times[index])

    def swallowed_energy(self, site: Site, fmt: FloatFormat) -> float:
        """Share of the sum of squares of all recorded updates of a trained tensor that storage in `fmt` swallows."""
        lost = self.index.get(_derived(site, f"swallowed_{fmt}"))
        if lost is None:
            return 0.0
        table, update = self.profile.table, self.index[site]
        elements = table.count[update] / self._times(update)
        sampled = table.count[lost] / self._times(lost)
        energy = table.sumsq[update]
        return float(min(table.sumsq[lost] * (elements / sampled) / energy, 1.0)) if energy > 0 else 0.0

    def stuck(self, site: Site, fmt: FloatFormat, *, ahead: int) -> Stuck:
        """How far storage in `fmt` would have left an untrained tensor behind, at its last recorded step, and `ahead`
        steps later."""
        rows = self.history(_derived(site, f"stuck_{fmt}"))
        updates = self.history(site)
        if not len(rows) or rows.step.iloc[-1] < updates.step.iloc[-1]:
            return Stuck(0.0, 0.0)
        last = rows.iloc[-1]
        away = int(last["count"] - last.zeros)
        steps = updates.step.to_numpy(float)
        mean = np.interp(steps, rows.step, rows["sum"] / rows["count"], left=0.0)
        return Stuck(away / int(last["count"]), math.sqrt(float(last.sumsq) / max(away, 1)), _ahead(steps, mean, ahead))

    def standing(self) -> dict[Site, float]:
        """Trained tensors (sites of role update) -> what they mean to the model's training: the larger of their shares
        of |g| |dw|, the progress that was made, and of |g|^2, that which one learning rate for all would have made.
        Equal shares where some gradient was not recorded."""
        table = self.profile.table
        sites = [s for s in self.updated() if self.is_trained(s)]
        gradients = [self.row(s, Role.GRAD_WEIGHT) for s in sites]
        if not sites or any(g is None for g in gradients):
            return {s: 1 / len(sites) for s in sites}
        squared = table.sumsq[gradients]
        made = np.sqrt(table.sumsq[[self.index[s] for s in sites]] * squared)
        share = np.maximum(made / max(made.sum(), 1e-300), squared / max(squared.sum(), 1e-300))
        return dict(zip(sites, share.tolist(), strict=True))

    def is_trained(self, site: Site) -> bool:
        """Whether an optimizer moves the tensor: it has gradients, or the optimizer's settings name it."""
        name = ".".join(filter(None, (site.module, site.tensor)))
        return name in self._settings or self.row(site, Role.GRAD_WEIGHT) is not None

    @cached_property
    def _settings(self) -> dict[str, dict[str, Any]]:
        return {
            name: {**group, "class": optimizer.get("class", "")}
            for optimizer in self.profile.run.get("optimizers", [])
            for group in optimizer.get("groups", [])
            for name in group.get("parameters", [])
        }

    def settings(self, module: str, tensor: str) -> dict[str, Any]:
        """The optimizer's class and settings for a parameter, {} where the run does not tell."""
        return self._settings.get(".".join(filter(None, (module, tensor))), {})

    def additions(self, site: Site) -> int:
        """How many backward passes add to the gradient of a parameter in one step (the most of all steps)."""
        gradient, weight = (self.index.get(site._replace(role=r)) for r in (Role.GRAD_WEIGHT, Role.WEIGHT))
        if gradient is None or weight is None:
            return 0
        most = self.profile.most
        summed = self.history(self.profile.sites[gradient])["count"].max() if most is None else most[gradient]
        elements = int(self.profile.table.count[weight]) // self._times(weight)
        return round(float(summed) / elements) if elements else 0

    def growth(self, site: Site, additions: int) -> float:
        """The size of the summed gradient over that of one contribution: `additions` where all point one way, its root
        where they are independent. Extrapolated from the sum after the last power of two of them, 64 or more; NaN
        where the run has no such sum."""
        sums = self.history(_derived(site, "grad"))
        single = self.history(site._replace(role=Role.GRAD_WEIGHT))
        if not len(sums) or not len(single):
            return float("nan")
        last, single = sums.iloc[-1], single[single.step == sums.step.iloc[-1]]
        if not len(single) or not float(single.sumsq.iloc[-1]) > 0:
            return float("nan")
        seen = 2 ** int(math.log2(max(additions, 1)))
        scale = float(single.loss_scale.iloc[-1])
        one = float(single.sumsq.iloc[-1]) / additions
        reached = math.sqrt(float(last.sumsq) / scale**2 / one)
        return min(reached * additions / seen, float(additions))


def _derived(site: Site, what: str) -> Site:
    return Site(site.module, Role.STATE, _DERIVED, f"{site.tensor}.{what}")


def flushed_energy(counts: np.ndarray, sumsq: float, fmt: FloatFormat) -> float:
    """Share of the sum of squares that values below the smallest subnormal of `fmt` hold; counts int64 [BINS]."""
    return float(min(counts @ rounding_table(fmt).flush_error / sumsq, 1.0)) if sumsq > 0 else 0.0


def _ahead(steps: np.ndarray, mean: np.ndarray, ahead: int) -> float:
    """`mean` carried on for `ahead` steps, where from its beginning on its second half grew at least half as fast as
    its first; else 0."""
    begin = max(int(np.argmax(mean > 0)) - 1, 0)
    steps, mean = steps[begin:], mean[begin:]
    if len(steps) < 3:
        return 0.0
    middle = len(steps) // 2
    early = (mean[middle] - mean[0]) / (steps[middle] - steps[0])
    late = (mean[-1] - mean[middle]) / (steps[-1] - steps[middle])
    return float(mean[-1] + late * ahead) if late > 0 and late >= early / 2 else 0.0
