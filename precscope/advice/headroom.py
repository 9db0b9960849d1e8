"""How many binades lie between what was recorded and the end of a format. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..sites import Role, Site

_CARRIED = 2.0**-0.25


@dataclass(frozen=True)
class Headroom:
    """amax: largest finite magnitude recorded at `site`. binades: log2 of the format's largest finite value over it;
    below 0 where it overflows. fmt: the format's name."""

    site: Site
    amax: float
    binades: float
    fmt: str

    def __str__(self) -> str:
        where = f"{self.site.module or '(root)'} {self.site.role.value} reaches {self.amax:.4g}"
        end = f"the end of {self.fmt} ({get_format(self.fmt).max:g})"
        if self.binades < 0:
            return f"{where}, {-self.binades:.1f} binades beyond {end}"
        return f"{where}, {self.binades:.1f} binades below {end}"


def headroom(
    profile: Profile,
    format: str | FloatFormat,
    *,
    roles: Iterable[str] = (Role.OUTPUT, Role.INPUT, Role.WEIGHT),
    limit: int | None = 10,
) -> list[Headroom]:
    """The sites nearest to the end of `format`, nearest first; one per module and role, at most `limit`.

    What a large value passes through is not told beside what makes it: inputs, and outputs of modules that hold others
    (a residual stream), are left out where some leaf's output is as large, give or take a quarter of a binade.
    """
    fmt = get_format(format)
    order = {Role(r): i for i, r in enumerate(roles)}
    sites, table = profile.merged(by="module")
    found = [
        Headroom(site, amax, math.log2(fmt.max / amax), fmt.name)
        for site, amax in zip(sites, table.amax.tolist(), strict=True)
        if site.role in order and amax > 0
    ]
    holders = {m.rpartition(".")[0] for m in profile.modules if m}
    made = [h.amax for h in found if _is_made(h, holders)]

    def hands_on(h: Headroom) -> bool:
        if h.site.role is Role.WEIGHT or _is_made(h, holders):
            return False
        return any(_CARRIED <= m / h.amax <= 1 / _CARRIED for m in made)

    told = [h for h in found if not hands_on(h)]
    ranked = sorted(told, key=lambda h: (h.binades, order[h.site.role], -h.site.module.count(".")))
    first = {h.amax: h for h in reversed(ranked)}  # one of those that are exactly as large: handed on as it is
    return [h for h in ranked if first[h.amax] is h][:limit]


def _is_made(h: Headroom, holders: set[str]) -> bool:
    return h.site.role is Role.OUTPUT and h.site.module not in holders
