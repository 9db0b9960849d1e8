"""Loss-scale bounds against really scaling and rounding."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precscope.advice.loss_scale import (
    ScaleInterval,
    best_common_scale,
    in_words,
    interval,
    largest_scale,
    own_bounds,
    site_bounds,
)  # fmt: skip
from precscope.formats import get_format
from precscope.kernels import summarize
from precscope.profiles import Profile
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
    assert lost(int(lo[0]) - 1) > 1e-3


def test_zero_gradients_bind_nothing():
    lo, hi = site_bounds(StatsTable.empty(1))
    assert interval([Site("a", Role.GRAD_OUTPUT)], lo, hi).lo_site is None


@pytest.mark.parametrize(("world", "low", "high"), [(1, 0, 0), (4, 2, 2), (3, 1, 2)])
def test_each_of_several_processes_has_larger_gradients_than_the_mean_loss(world, low, high):
    profile = Profile(Path("runs/a"), {"merged_over": world}, [], StatsTable.empty(0), {})
    table = StatsTable.concat([summarize(torch.full((8,), 100.0)).table(), StatsTable.empty(1)])
    lo, hi = site_bounds(table, headroom=0)
    own_lo, own_hi = own_bounds(profile, lo, hi)
    assert (own_lo[0], own_hi[0]) == (lo[0] - low, hi[0] - high)
    assert (own_lo[1], own_hi[1]) == (lo[1], hi[1])
    per_process = world * 100.0 * 2.0 ** int(own_hi[0])
    assert not FP16.overflows(per_process) and FP16.overflows(4 * per_process)


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


def test_the_sentence_tells_the_range_and_what_binds_it_or_that_none_works():
    a, b = Site("small", Role.GRAD_OUTPUT), Site("big", Role.GRAD_WEIGHT)
    text = in_words(ScaleInterval(4, 20, a, b))
    assert "from 2^4 to 2^20" in text and "small.grad_output needs at least 2^4" in text and "Start at 2^16" in text
    assert "big.grad_weight overflows beyond 2^20" in text
    assert in_words(ScaleInterval(9, 3, a, b)).startswith("No single loss scale works")
    assert "no loss scale is needed" in in_words(ScaleInterval(0, 24, None, None))


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/loss_scale.py, which really runs what is predicted."""
    spec = importlib.util.spec_from_file_location(
        "loss_scale_benchmark", Path(__file__).parents[1] / "benchmarks" / "loss_scale.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_scales_inside_work_and_just_outside_fail_when_fp16_is_really_run(benchmark, tmp_path, name):
    if name == "resnet":
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    result = benchmark.check(benchmark.MODELS[name][0](), tmp_path / "run")
    assert result["holds"]["inside"] and result["holds"]["above"], result
    # A histogram knows binades only: 0.93 of the tolerance on the text of one Python's library, 1.2 to 6 on others'.
    assert result["below_lost_at_named"] > 0.9 * benchmark.TOLERANCE, result
    assert result["above_is_named"]
