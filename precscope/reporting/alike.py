"""Models of very many sites: modules whose names differ only in their numbers, as one.

`layers.3.experts.17.w1` and `layers.3.experts.2.w1` are both `layers.3.experts.*.w1`. Histograms add up, variances add
up, and the largest magnitude is the largest of all: what is said of the one row holds of all the tensors behind it
together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from ..sites import Site

SITES = 12_000
"""A page carries each of so many sites; of more, those alike as one."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@lru_cache(maxsize=1 << 17)
def pattern(module: str, numbers: int | None = None) -> str:
    """The name with a "*" for each part that is a number; with `numbers`, for so many of the last ones only."""
    found = list(_NUMBER.finditer(module))
    for part in reversed(found if numbers is None else found[max(len(found) - numbers, 0) :]):
        module = module[: part.start()] + "*" + module[part.end() :]
    return module


def merging(sites: Sequence[Site], *, most: int = SITES) -> Callable[[Site], Site] | None:
    """site -> the one that stands for all alike, of as few numbers as leave `most` sites or less (of all numbers where
    that is not enough); None where there are no more than `most`."""
    if len(sites) <= most:
        return None
    deepest = max(len(_NUMBER.findall(s.module)) for s in sites)
    for numbers in range(1, deepest + 1):
        if len({alike(s, numbers) for s in sites}) <= most:
            break
    return lambda site: alike(site, numbers)


def alike(site: Site, numbers: int) -> Site:
    """The site that stands for those that differ in the last `numbers` numbers of the module's name."""
    return Site(pattern(site.module, numbers), site.role, site.call)
