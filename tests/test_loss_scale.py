"""Loss-scale bounds against really scaling and rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precscope.advice.loss_scale import best_common_scale, interval, largest_scale, site_bounds
from precscope.formats import get_format
from precscope.kernels import summarize
from precscope.sites import Role, Site
from precscope.stats import StatsTable

FP16 = get_format("fp16")


@given(st.floats(1e-30, 1e30), st.sampled_from(["fp16", "e4m3", "e5m2"]))
@settings(max_examples=300, deadline=None)
def test_largest_scale_is_the_last_that_does_not_overflow(amax, name):
    fmt = get_format(name)
    k = largest_scale(amax, fmt)
    assert not fmt.overflows(amax * 2.0**k)
    assert fmt.overflows(amax * 2.0 ** (k + 1))


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-4, 1.0, 1e4])
def test_bounds_hold_when_gradients_are_really_scaled_to_fp16(scale):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(1 << 16, generator=generator) * scale * torch.exp(torch.randn(1 << 16, generator=generator))
    lo, hi = site_bounds(summarize(g).table(), headroom=0, tolerance=1e-3)

    def lost(k: int) -> float:
        scaled = (g.double() * 2.0**k).half()
        return float(g.double()[scaled == 0].square().sum() / g.double().square().sum())

    def overflows(k: int) -> bool:
        return bool((g.double() * 2.0**k).half().isinf().any())

    assert not overflows(int(hi[0])) and overflows(int(hi[0]) + 1)
    assert lost(int(lo[0])) <= 1e-3
    assert lost(int(lo[0]) - 3) > 1e-3  # a histogram knows a binade, not a value: three below surely loses


def test_zero_gradients_bind_nothing():
    lo, hi = site_bounds(StatsTable.empty(1))
    assert interval([Site("a", Role.GRAD_OUTPUT)], lo, hi).lo_site is None


def test_interval_names_the_binding_sites():
    sites = [Site("big", Role.GRAD_OUTPUT), Site("small", Role.GRAD_OUTPUT)]
    table = StatsTable.concat([summarize(torch.full((8,), v)).table() for v in (100.0, 1e-6)])
    found = interval(sites, *site_bounds(table, headroom=0))
    assert found.hi_site == sites[0] and found.hi == 9  # 100 * 2^9 = 51200
    assert found.lo_site == sites[1] and not found.empty
    assert found.lo <= found.recommended <= found.hi


def test_empty_interval_and_the_best_compromise():
    table = StatsTable.concat([summarize(torch.full((8,), v)).table() for v in (6e4, 6e4, 1e-12)])
    lo, hi = site_bounds(table, headroom=0)
    sites = [Site(n, Role.GRAD_OUTPUT) for n in "abc"]
    assert interval(sites, lo, hi).empty
    k = best_common_scale(lo, hi, np.ones(3))
    assert k <= hi[0]  # two against one
    assert best_common_scale(lo, hi, np.asarray([1.0, 1.0, 9.0])) >= lo[2]
