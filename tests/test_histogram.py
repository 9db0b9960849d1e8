"""Tables over binades against brute force: rounding errors of grids, flushing, shifting, swallowed updates."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from precscope.formats import get_format
from precscope.histogram import (
    BINADES,
    BINS,
    EXP_HI,
    EXP_LO,
    mean_square,
    rounding_table,
    shift_bins,
    swallowed_expected,
    swallowed_share,
)

NUMPY = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def grid_of(source: str, binade: int) -> np.ndarray:
    """All values of `source` in [2^binade, 2^(binade+1)), float64."""
    fmt = get_format(source)
    step = 2.0 ** fmt.ulp_exponent(binade)
    return np.arange(2.0**binade, 2.0 ** (binade + 1), step)


def test_bins_are_the_binades_from_exp_lo_to_exp_hi():
    assert (EXP_LO, EXP_HI, BINS) == (-151, 128, 280)
    assert len(BINADES) == BINS and BINADES[0] == EXP_LO and BINADES[-1] == EXP_HI


@pytest.mark.parametrize("points", [1, 2, 8, 1024])
def test_mean_square_of_equally_spaced_values(points):
    values = 1 + np.arange(points) / points
    assert mean_square(np.array([float(points)]))[0] == pytest.approx((values**2).mean(), rel=1e-14)


@pytest.mark.parametrize("source", ["bf16", "fp16", "e4m3"])
@pytest.mark.parametrize("target", ["fp16", "bf16", "e4m3", "e5m2"])
def test_error_and_flushed_share_of_a_grid_equal_real_rounding_in_every_binade(source, target):
    """The formulas for values on the source's grid are exact: every binade of the source, all of its values."""
    fmt, grid_format = get_format(target), get_format(source)
    lowest = max(grid_format.emin - grid_format.precision, -120)
    for scale in (-8, 0, 8):
        table = rounding_table(fmt, scale_exponent=scale, source=grid_format)
        # the top binade may end early; the others overflow whole
        binades = range(lowest, min(grid_format.emax, 100, fmt.emax - scale))
        assert len(binades) >= 8
        for binade in binades:
            x = grid_of(source, binade) * 2.0**scale
            rounded = x.astype(np.float32).astype(NUMPY[target]).astype(np.float64)
            error = ((rounded - x) ** 2).mean() / 4.0**scale
            column = binade - EXP_LO
            assert table.error[column] == pytest.approx(error, rel=1e-9, abs=0), (binade, scale)
            assert table.flushed[column] == pytest.approx((rounded == 0).mean(), rel=1e-12), (binade, scale)
            kept_subnormal = ((rounded != 0) & (x < fmt.smallest_normal)).mean()
            assert table.subnormal[column] == pytest.approx(kept_subnormal, rel=1e-12), (binade, scale)


@pytest.mark.parametrize("target", ["fp16", "bf16", "e4m3", "e5m2"])
def test_continuous_values_follow_the_formulas_of_the_design(target):
    fmt = get_format(target)
    table = rounding_table(fmt)
    for binade, error, flushed, subnormal in zip(BINADES, table.error, table.flushed, table.subnormal, strict=True):
        ulp = 2.0 ** fmt.ulp_exponent(int(binade))
        if binade > fmt.emax:
            assert error == 0 and table.overflows[binade - EXP_LO] == 1
        elif binade < fmt.emin - fmt.precision - 1:
            assert error == pytest.approx(7 / 3 * 4.0**binade) and flushed == 1
        else:
            assert error == pytest.approx(ulp**2 / 12, rel=1e-12)
            assert flushed == pytest.approx(0, abs=1e-12)
        assert subnormal == pytest.approx(float(fmt.emin - fmt.precision - 1 <= binade < fmt.emin))


def test_a_format_holds_what_was_recorded_in_it():
    for name in ("fp16", "bf16", "fp32", "e4m3", "e5m2"):
        fmt = get_format(name)
        table = rounding_table(fmt, source=fmt)
        smallest = fmt.emin - fmt.precision
        recordable = (BINADES - smallest >= 0) & (BINADES - fmt.emax <= 0)
        assert not table.error[recordable].any()


def test_a_divided_out_loss_scale_moves_the_subnormals_of_the_source():
    """fp16 gradients recorded at scale 2^16, asked for that very scale, lose nothing; asked without it, they do."""
    fp16 = get_format("fp16")
    there = rounding_table(fp16, scale_exponent=16, source=fp16, source_exponent=-16)
    recorded = (BINADES >= -24 - 16) & (BINADES <= 15 - 16)
    assert not there.error[recorded].any()
    without = rounding_table(fp16, source=fp16, source_exponent=-16)
    assert without.error[-20 - EXP_LO] > 0
    assert rounding_table(fp16, source=fp16).error[-20 - EXP_LO] == 0


@pytest.mark.parametrize("k", [0, 1, -1, 7, -30, 279, -279, 280, -280, 1000, -1000])
def test_shift_bins_moves_counts_and_gathers_them_at_the_ends(k):
    counts = np.arange(1, 2 * BINS + 1).reshape(2, BINS)
    shifted = shift_bins(counts, k)
    expected = np.zeros_like(counts)
    for i in range(BINS):
        expected[:, min(max(i + k, 0), BINS - 1)] += counts[:, i]
    assert (shifted == expected).all()
    assert shifted is not counts


def differences(w: np.ndarray, dw: np.ndarray) -> tuple[np.ndarray, int, int]:
    moves = (w != 0) & (dw != 0)
    d = np.frexp(dw[moves])[1].astype(np.int64) - np.frexp(w[moves])[1]
    counts = np.bincount(np.clip(d - EXP_LO, 0, BINS - 1), minlength=BINS)
    return counts, int((dw == 0).sum()), int(((w == 0) & (dw != 0)).sum())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("weights", ["normal", "powers of two", "one over"])
@pytest.mark.parametrize("size", [-12.0, -10.0, -8.0, -4.0])
def test_swallowed_bounds_contain_what_storing_really_swallows(name, weights, size):
    rng = np.random.default_rng(7)
    n = 1 << 14
    w = {
        "normal": rng.normal(size=n),
        "powers of two": np.exp2(rng.integers(-3, 4, n).astype(float)) * rng.choice([-1, 1], n),
        "one over": (1 + 2.0 ** -get_format(name).precision) * np.exp2(rng.integers(-3, 4, n).astype(float)),
    }[weights]
    fmt = get_format(name)
    w = w.astype(NUMPY[name]).astype(np.float32)
    w = np.where(np.abs(w) < fmt.smallest_normal, 0, w).astype(np.float32)
    w[::17] = 0
    dw = (w * 2.0**size * rng.normal(size=n)).astype(np.float32)
    dw[::5] = np.copysign(2.0 ** (np.frexp(w[::5])[1] - fmt.precision - 2.0), dw[::5])  # exact ties
    dw[::17] = rng.choice([0.5, -0.25], len(dw[::17]))
    dw[::23] = 0
    counts, unchanged, from_zero = differences(w, dw)
    stored = (w + dw).astype(NUMPY[name]).astype(np.float32)
    swallowed = ((stored == w) & (dw != 0)).mean()
    lo, hi = swallowed_share(counts, fmt.precision, unchanged=unchanged, from_zero=from_zero)
    assert lo <= swallowed <= hi
    assert lo <= swallowed_expected(counts, fmt.precision, unchanged=unchanged, from_zero=from_zero) <= hi


def test_swallowed_expected_is_close_where_nothing_is_special():
    rng = np.random.default_rng(3)
    w = rng.normal(size=1 << 16).astype(ml_dtypes.bfloat16).astype(np.float32)
    dw = (w * 2.0**-9 * rng.normal(size=w.size)).astype(np.float32)
    counts, unchanged, from_zero = differences(w, dw)
    truth = ((w + dw).astype(ml_dtypes.bfloat16).astype(np.float32) == w).mean()
    assert swallowed_expected(counts, 7, unchanged=unchanged, from_zero=from_zero) == pytest.approx(truth, abs=0.01)


def test_swallowed_bounds_widen_by_what_is_uncertain_and_are_zero_without_updates():
    counts = np.zeros((2, BINS), np.int64)
    counts[0, -30 - EXP_LO], counts[0, 0 - EXP_LO] = 3, 1
    lo, hi = swallowed_share(counts, 7, uncertain=np.array([0.1, 0.0]))
    assert lo.tolist() == [0.75, 0.0]
    assert hi.tolist() == pytest.approx([0.85, 0.0])
    assert swallowed_share(counts, 7, uncertain=1.0)[1].tolist() == [1.0, 1.0]
