"""Forecasts of amax: calibrated on series whose future is known, silent where nothing can be said."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import precscope as ps
from precscope.advice.forecast import extrapolate, forecast, required_headroom
from precscope.advice.headroom import headroom
from precscope.errors import UsageError
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.stats import StatsTable


def series(kind, rng, n):
    """log2 amax of n consecutive steps."""
    t = np.arange(n)
    noise = rng.gumbel(0, 0.1, n)
    return {
        "stationary": noise,
        "walk": np.cumsum(rng.normal(0, 0.03, n)) + noise / 2,
        "exponential": 0.004 * t + noise,
        "linear": np.log2(10 + 0.2 * t) + noise,
        "bounded": rng.normal(0, 0.2, n),
    }[kind]


@pytest.mark.parametrize("kind", ["stationary", "walk", "exponential", "linear", "bounded"])
@pytest.mark.parametrize(("recorded", "every", "horizon"), [(10, 10, 100), (40, 5, 400)])
def test_the_largest_amax_to_come_lies_in_the_stated_interval(kind, recorded, every, horizon):
    inside, below, predicted, happened = [], [], [], []
    for seed in range(60):
        x = series(kind, np.random.default_rng(seed), recorded * every + horizon)
        steps = np.arange(0, recorded * every, every)
        ahead = extrapolate(steps, 2.0 ** x[steps], horizon)
        assert ahead is not None
        truth = x[steps[-1] + 1 : steps[-1] + 1 + horizon].max()
        lo, hi = np.quantile(ahead.highest, [0.05, 0.95])
        inside.append(lo <= truth <= hi)
        below.append(truth <= hi)
        for distance in (0.3, 0.6, 1.2):
            predicted.append(ahead.chance_beyond(ahead.now + distance)[0])
            happened.append(truth > ahead.now + distance)
    assert np.mean(inside) >= 0.75 and np.mean(below) >= 0.82  # of 60 series: 90% and 95% less three standard errors
    error = np.mean(predicted) - np.mean(happened)
    assert -0.16 <= error <= 0.3  # rather warned in vain than not warned


def test_constant_amax_below_the_limit_is_safe_and_exponential_growth_is_not():
    steps = np.arange(0, 200, 10)
    flat = extrapolate(steps, np.full(20, 100.0), 200)
    assert flat is not None and flat.chance_beyond(math.log2(100) + 1.1)[2] < 1e-3
    noisy = extrapolate(steps, 100 * 2 ** np.random.default_rng(0).gumbel(0, 0.05, 20), 200)
    assert noisy is not None and noisy.chance_beyond(noisy.now + 1.1)[0] < 0.02
    grown = extrapolate(steps, 2.0 ** (steps / 100), 300)
    assert grown is not None and grown.chance_beyond(3.5)[1] > 0.95
    assert grown.chance_beyond(8.0)[0] < 0.05


@given(st.floats(-60, 60), st.integers(8, 60), st.floats(0, 0.05), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scaling_a_history_moves_the_forecast_by_as_much(shift, n, slope, seed):
    steps = np.arange(n) * 5
    x = slope * np.arange(n) + np.random.default_rng(seed).gumbel(0, 0.1, n)
    one, other = extrapolate(steps, 2.0**x, 50), extrapolate(steps, 2.0 ** (x + shift), 50)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        np.testing.assert_allclose(other.highest - other.now, one.highest - one.now, atol=1e-5)


@given(st.integers(0, 1000), st.floats(0.05, 3))
@settings(max_examples=40, deadline=None)
def test_chances_are_chances_and_fall_with_distance_and_rise_with_the_horizon(seed, distance):
    steps = np.arange(20) * 10
    amax = 2.0 ** np.random.default_rng(seed).gumbel(0, 0.1, 20)
    near, far = extrapolate(steps, amax, 50), extrapolate(steps, amax, 2000)
    assert near is not None
    p, lo, hi = near.chance_beyond(near.now + distance)
    assert 0 <= lo <= p <= 1 and lo <= hi <= 1
    assert near.chance_beyond(near.now + 2 * distance)[0] <= p + 1e-12
    if far is not None:
        assert far.chance_beyond(far.now + distance)[0] >= p - 0.02


@pytest.mark.parametrize(("steps", "amax", "horizon"), [
    (np.arange(7), np.ones(7), 5),
    (np.arange(20), np.r_[np.ones(19), np.inf], 5),
    (np.arange(20), np.r_[np.ones(19), 0.0], 5),
    (np.arange(20), 2.0 ** np.arange(20), 20 * 20),  # a trend is not carried on for twenty times its span
    (np.arange(100), np.r_[1 + 1e-3 * np.random.default_rng(0).random(60), 500.0, np.ones(39)], 50),  # a jump
])  # fmt: skip
def test_it_is_silent_where_the_data_carry_nothing(steps, amax, horizon):
    assert extrapolate(steps, amax, horizon) is None


def test_a_flat_history_may_be_carried_further_than_a_trend():
    steps = np.arange(40)
    assert extrapolate(steps, 2.0 ** np.random.default_rng(0).gumbel(0, 0.1, 40), 2000) is not None


def profile_of(tmp_path, histories):
    """A profile whose history has (site -> amax per step, every 10th)."""
    rows = [
        {"step": 10 * i, "module": s.module, "role": s.role.value, "call": s.call, "tensor": s.tensor, "amax": a,
         "pos_inf": 0, "nan": int(a != a)}
        for s, amax in histories.items() for i, a in enumerate(amax)
    ]  # fmt: skip
    table = StatsTable.empty(len(histories))
    table.amax[:] = [np.nanmax(a) for a in histories.values()]
    return Profile(tmp_path, {}, list(histories), table, {}, _history=pd.DataFrame(rows))


def test_forecast_of_a_profile_is_a_row_per_site(tmp_path):
    rng = np.random.default_rng(0)
    histories = {
        Site("growing", Role.OUTPUT): 1000 * 2.0 ** (np.arange(20) / 5),
        Site("steady", Role.OUTPUT): 30000 * 2.0 ** (0.02 * rng.random(20)),
        Site("short", Role.OUTPUT): np.full(5, 10.0),
        Site("beyond", Role.INPUT): np.full(20, 1e5),
        Site("gradient", Role.GRAD_OUTPUT): np.ones(20),
    }
    profile = profile_of(tmp_path, histories)
    table = forecast(profile, "fp16", horizon=200).set_index("module")
    assert list(table.index) == ["growing", "steady", "short", "beyond"]
    assert table.p_overflow["growing"] > 0.95 and table.p_lo["growing"] <= table.p_overflow["growing"]
    assert table.p_overflow["steady"] < 0.01 and table.headroom["steady"] == pytest.approx(1.1, abs=0.05)
    assert math.isnan(table.p_overflow["short"]) and table.p_overflow["beyond"] == 1.0
    assert table.headroom_least["growing"] < table.headroom_ahead["growing"] < table.headroom["growing"]
    assert math.isnan(table.headroom_ahead["short"])
    needed = required_headroom(profile, 200)
    assert needed[Site("growing", Role.OUTPUT)] > 3.5 and needed[Site("steady", Role.OUTPUT)] < 0.3
    assert math.isnan(needed[Site("short", Role.OUTPUT)])
    assert list(required_headroom(profile, 200, among={Site("steady", Role.OUTPUT)})) == [Site("steady", Role.OUTPUT)]
    with pytest.raises(UsageError, match="horizon must be 1 step or more, not 0"):
        forecast(profile, "fp16", horizon=0)


def test_headroom_names_the_nearest_sites_once(tmp_path):
    histories = {
        Site("block", Role.OUTPUT): np.full(8, 26000.0),
        Site("block.down", Role.OUTPUT): np.full(8, 26000.0),
        Site("next", Role.INPUT): np.full(8, 26000.0),
        Site("block.up", Role.OUTPUT): np.full(8, 100.0),
        Site("huge", Role.OUTPUT): np.full(8, 1e5),
        Site("zero", Role.OUTPUT): np.zeros(8),
    }
    found = headroom(profile_of(tmp_path, histories), "fp16")
    assert [h.site.module for h in found] == ["huge", "block.down", "block.up"]
    assert found[1].binades == pytest.approx(1.33, abs=0.01)
    assert str(found[1]) == "block.down output reaches 2.6e+04, 1.3 binades below the end of fp16 (65504)"
    assert "0.6 binades beyond the end of fp16" in str(found[0])


def test_an_unknown_role_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    with ps.record(model, tmp_path / "run") as rec:
        model(torch.ones(1, 2))
        rec.step()
    with pytest.raises(UsageError, match="unknown role 'outputs'; roles are input, output"):
        forecast(Profile.load(tmp_path / "run"), "fp16", roles=["outputs"])
