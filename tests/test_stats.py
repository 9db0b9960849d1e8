"""Merging as algebra, tables against rows, and the answers against really rounding the values."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precscope.errors import FormatError, UsageError
from precscope.formats import get_format
from precscope.histogram import BINS, EXP_HI, EXP_LO
from precscope.stats import FormatAnswer, StatsTable, TensorStats

NUMPY = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
DISTRIBUTIONS = ("normal", "wide", "heavy", "small", "relu", "uniform", "constant")


@np.errstate(over="ignore")
def stats_of(values: np.ndarray, source: str = "fp32", weights: np.ndarray | None = None) -> TensorStats:
    """An independent count by frexp. weights: dL/dy of each value."""
    x = np.asarray(values, dtype=np.float64).ravel()
    finite = np.isfinite(x)
    nonzero = x[finite & (x != 0)]
    column = np.clip(np.frexp(nonzero)[1] - 1 - EXP_LO, 0, BINS - 1)
    priced = None
    if weights is not None:
        priced = np.bincount(column, weights=np.asarray(weights)[finite & (x != 0)] ** 2, minlength=BINS)
    return TensorStats(
        counts=np.bincount(column, minlength=BINS),
        zeros=int((x == 0).sum()),
        pos_inf=int((x == np.inf).sum()),
        neg_inf=int((x == -np.inf).sum()),
        nan=int(np.isnan(x).sum()),
        amax=float(np.abs(nonzero).max(initial=0.0)),
        amin_nonzero=float(np.abs(nonzero).min(initial=np.inf)),
        sum=float(x[finite].sum()),
        sumsq=float((x[finite] ** 2).sum()),
        source=source,
        weights=priced,
    )


def draw(name: str, n: int = 1 << 16) -> np.ndarray:
    rng = np.random.default_rng(DISTRIBUTIONS.index(name))
    return {
        "normal": lambda: rng.normal(size=n),
        "wide": lambda: np.exp2(rng.normal(scale=1.5, size=n)) * rng.choice([-1, 1], n),
        "heavy": lambda: rng.standard_t(5, size=n) * 0.1,
        "small": lambda: np.exp2(rng.normal(-18, 1.5, n)) * rng.choice([-1, 1], n),
        "relu": lambda: np.maximum(rng.normal(scale=3, size=n), 0),
        "uniform": lambda: rng.uniform(-200, 200, n),
        "constant": lambda: np.full(n, 0.3),
    }[name]().astype(np.float32)


def really_round(x: np.ndarray, name: str, k: int) -> FormatAnswer:
    """What a cast to the format does to the float64 values x * 2^k. Overflow is counted before the cast."""
    fmt = get_format(name)
    nonzero = np.isfinite(x) & (x != 0)
    y = x[nonzero] * 2.0**k
    over = np.array([fmt.overflows(m) for m in np.abs(y)])
    kept = y[~over]
    rounded = kept.astype(np.float32).astype(NUMPY[name]).astype(np.float64)
    assert np.isfinite(rounded).all()
    noise = ((rounded - kept) ** 2).sum()
    sqnr = np.inf if noise == 0 else 10 * np.log10((kept**2).sum() / noise)
    lost = over.mean() * over.size / x.size
    subnormal = ((rounded != 0) & (np.abs(kept) < fmt.smallest_normal)).sum() / x.size
    return FormatAnswer(lost, lost, (rounded == 0).sum() / x.size, subnormal, sqnr, np.nan)


@pytest.mark.parametrize("scale", [-8, 0, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_answers_agree_with_real_rounding(name, scale):
    for source, fmt in itertools.product(("fp32", "bf16", "fp16"), ("fp16", "bf16", "e4m3", "e5m2")):
        case = f"{source} to {fmt}"
        with np.errstate(over="ignore", under="ignore"):
            x = draw(name).astype(NUMPY[source]).astype(np.float64)
        asked = stats_of(x, source).ask(fmt, scale_exponent=scale)
        truth = really_round(x, fmt, scale)
        assert asked.flushed == pytest.approx(truth.flushed, abs=1e-3), case
        assert asked.subnormal == pytest.approx(truth.subnormal, abs=1e-3), case
        assert asked.overflow_lo <= truth.overflow_lo <= asked.overflow_hi, case
        if truth.overflow_lo == np.mean(x != 0):
            assert np.isnan(asked.sqnr_db), case
        elif truth.sqnr_db > 120:
            assert asked.sqnr_db > 120, case  # a few values out of all lose bits: which ones is chance
        else:
            assert asked.sqnr_db == pytest.approx(truth.sqnr_db, abs=1.0), case


def test_a_tensor_asked_for_its_own_format_loses_nothing():
    for source in ("fp16", "bf16", "e4m3", "e5m2"):
        x = (draw("normal") * 0.1).astype(NUMPY[source]).astype(np.float64)
        answer = stats_of(x, source).ask(source)
        assert np.isnan(answer.loss_noise)
        assert dataclasses.replace(answer, loss_noise=0.0) == FormatAnswer(0.0, 0.0, 0.0, answer.subnormal, np.inf, 0.0)


def test_mixed_sources_are_treated_as_continuous():
    x = draw("normal").astype(ml_dtypes.bfloat16).astype(np.float64)
    both = stats_of(x, "bf16") + stats_of(draw("normal"), "fp32")
    assert both.source == "mixed"
    assert both.ask("bf16").sqnr_db == pytest.approx(stats_of(draw("normal")).ask("bf16").sqnr_db, abs=0.1)


@pytest.mark.parametrize(
    ("values", "fmt", "lo", "hi"),
    [
        ([65519.0, 1.0], "fp16", 0, 0),  # amax settles the top binade: rounds to 65504
        ([65520.0, 1.0], "fp16", 1, 1),
        ([40000.0, 65520.0, 65520.0, 1.0], "fp16", 1, 3),
        ([65520.0, 65521.0], "fp16", 2, 2),  # amin settles it: everything overflows
        ([464.0, 3.0], "e4m3", 0, 0),
        ([464.1, 3.0], "e4m3", 1, 1),
        ([61440.0, 3.0], "e5m2", 1, 1),
        ([61439.0, 3.0], "e5m2", 0, 0),
        ([1e30, 1e30, 40000.0, 1.0], "fp16", 2, 3),
        ([math.inf, -math.inf, math.nan, 1.0], "fp16", 0, 0),  # already non-finite: their own columns
        ([1e300, 1.0], "bf16", 1, 1),  # beyond the last bin
        ([1e300, 1e-300], "fp64", 0, 0),
        ([0.0, 0.0], "fp16", 0, 0),
    ],
)
def test_overflow_interval_is_settled_where_the_extremes_settle_it(values, fmt, lo, hi):
    answer = stats_of(np.array(values), "fp64").ask(fmt)
    assert (answer.overflow_lo * len(values), answer.overflow_hi * len(values)) == (lo, hi)


def test_overflow_far_outside_the_bins():
    """The last bin reaches to infinity and bin 0 to zero: with large scales they only give bounds."""
    far = stats_of(np.array([1e300, 1e200, 3.0]), "fp64").ask("bf16", scale_exponent=-500)  # 1e300 alone overflows
    assert (far.overflow_lo * 3, far.overflow_hi * 3) == (pytest.approx(1), pytest.approx(2))
    tiny = np.array([1e-300, 1e-200])
    assert stats_of(tiny, "fp64").ask("fp16", scale_exponent=900).overflow_lo * 2 == pytest.approx(1)


def test_nothing_and_zeros_and_all_lost():
    empty = TensorStats.empty().ask("fp16")
    assert (empty.overflow_lo, empty.overflow_hi, empty.flushed, empty.subnormal, empty.sqnr_db) == (0, 0, 0, 0, np.inf)
    zeros = stats_of(np.zeros(5)).ask("e4m3")
    assert (zeros.flushed, zeros.sqnr_db) == (0, np.inf)
    flushed = stats_of(np.array([1e-9, 2e-9, 0.0, 3e-9])).ask("fp16")
    assert flushed.flushed == 0.75
    assert flushed.sqnr_db == pytest.approx(0, abs=1.5)
    assert flushed.sqnr_db >= 0
    assert np.isnan(stats_of(np.array([1e9, 2e9])).ask("fp16").sqnr_db)


def test_a_constant_tensor_is_rounded_exactly():
    ones = stats_of(np.ones(10))
    assert ones.ask("e4m3").sqnr_db == np.inf
    third = stats_of(np.full(10, np.float32(1 / 3)))
    error = float(np.float32(1 / 3)) - float(np.float16(1 / 3))
    assert third.ask("fp16").sqnr_db == pytest.approx(20 * math.log10(1 / 3 / abs(error)), abs=0.01)
    tie = stats_of(np.full(4, 2.0**-25))
    assert (tie.ask("fp16").flushed, tie.ask("fp16").subnormal) == (1.0, 0.0)
    assert stats_of(np.full(4, 2.0**-25 * 1.001)).ask("fp16").flushed == 0.0


def test_loss_noise_is_the_standard_deviation_of_the_linearised_loss():
    rng = np.random.default_rng(0)
    y, g = rng.normal(size=1 << 14).astype(np.float32), rng.normal(size=1 << 14)
    predicted = stats_of(y, weights=g).ask("e4m3").loss_noise
    rounded = y.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    measured = math.sqrt((g**2 * (rounded - y) ** 2).sum())
    assert predicted == pytest.approx(measured, rel=0.05)
    assert math.isnan(stats_of(y).ask("e4m3").loss_noise)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
tensors = st.lists(
    st.one_of(finite, st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149])), max_size=30
)
records = st.builds(lambda x, s: stats_of(np.array(x), s), tensors, st.sampled_from(["fp32", "bf16", "mixed"]))


def assert_same(a: TensorStats, b: TensorStats) -> None:
    """Counts, extremes and source equal; sums to the rounding of float64."""
    size = math.sqrt(max(a.count, 1) * max(a.sumsq, b.sumsq))
    assert a.sum == pytest.approx(b.sum, rel=1e-12, abs=1e-12 * size)
    assert a.sumsq == pytest.approx(b.sumsq, rel=1e-12)
    assert dataclasses.replace(a, sum=0.0, sumsq=0.0) == dataclasses.replace(b, sum=0.0, sumsq=0.0)


@given(records)
def test_merging_has_an_identity(a):
    assert a + TensorStats.empty() == a
    assert TensorStats.empty() + a == a


@given(records, records)
def test_merging_commutes(a, b):
    assert_same(a + b, b + a)


@given(records, records, records)
def test_merging_is_associative(a, b, c):
    assert_same((a + b) + c, a + (b + c))


@given(tensors, tensors)
def test_merged_parts_equal_the_whole(x, y):
    assert_same(stats_of(np.array(x)) + stats_of(np.array(y)), stats_of(np.array(x + y)))


@settings(max_examples=30)
@given(st.lists(st.tuples(records, st.integers(0, 3)), max_size=8))
def test_grouping_a_table_equals_adding_rows(rows):
    table = StatsTable.concat([r.table() for r, _ in rows])
    grouped = table.group([key for _, key in rows], 4)
    for key in range(4):
        expected = TensorStats.empty()
        for record, own in rows:
            if own == key:
                expected = expected + record
        assert_same(grouped.row(key), expected)


def test_weights_merge_and_missing_weights_count_as_zero():
    x = np.array([1.0, 2.0, 4.0])
    priced, plain = stats_of(x, weights=np.array([1.0, 2.0, 3.0])), stats_of(x)
    assert (priced + plain).weights.sum() == 14
    assert (priced + priced).weights[-EXP_LO] == 2
    assert (plain + plain).weights is None


@given(tensors, st.integers(-20, 20))
def test_shift_is_the_statistics_of_the_scaled_values(x, k):
    values = np.array(x, dtype=np.float64)
    shifted = stats_of(values).shift(k)
    assert shifted.source_exponent == k
    assert dataclasses.replace(shifted, source_exponent=0) == stats_of(values * 2.0**k)


def test_shift_takes_one_exponent_per_row_and_leaves_the_table_alone():
    table = StatsTable.concat([stats_of(np.array([1.0, 3.0])).table()] * 3)
    before = table.counts.copy()
    shifted = table.shift([0, 4, -16])
    assert shifted.amax.tolist() == [3.0, 48.0, 3 / 65536]
    shifted.zeros[:] = 9
    assert (table.counts == before).all() and not table.zeros.any()


def test_scale_of_ask_equals_asking_the_shifted_statistics():
    record = stats_of(draw("wide"))
    assert record.ask("fp16", scale_exponent=6) == pytest.approx(record.shift(6).ask("fp16"), nan_ok=True) or (
        dataclasses.astuple(record.ask("fp16", scale_exponent=6))[:5]
        == pytest.approx(dataclasses.astuple(record.shift(6).ask("fp16"))[:5])
    )


def test_rows_take_and_table_round_trip():
    records = [stats_of(draw(n, 100), s) for n, s in (("normal", "fp32"), ("wide", "bf16"), ("small", "fp16"))]
    table = StatsTable.concat([r.table() for r in records])
    assert len(table) == 3 and table.count.tolist() == [100] * 3
    assert [table.row(i) == r for i, r in enumerate(records)] == [True] * 3
    assert table.take([2, 0]).source.tolist() == ["fp16", "fp32"]
    assert table.take(np.array([False, True, False])).row(0) == records[1]
    assert len(table.take([])) == 0
    assert len(StatsTable.concat([])) == 0
    assert all(len(column) == 0 for column in StatsTable.empty(0).ask("fp16").values())


def test_a_table_answers_row_by_row_like_its_rows():
    sources = ["fp32", "bf16", "fp16", "mixed"]
    records = [stats_of(draw(n, 500), sources[i % 4]) for i, n in enumerate(DISTRIBUTIONS)]
    records += [TensorStats.empty(), stats_of(np.array([np.nan]))]
    table = StatsTable.concat([r.table() for r in records])
    scales = np.arange(len(records)) - 4
    answers = table.ask("e5m2", scale_exponent=scales)
    for i, record in enumerate(records):
        expected = record.ask("e5m2", scale_exponent=int(scales[i]))
        for name, column in answers.items():
            assert column[i] == pytest.approx(getattr(expected, name), nan_ok=True), (i, name)


def test_group_refuses_keys_that_do_not_fit():
    with pytest.raises(UsageError, match=r"group: 2 rows need as many keys in 0\.\.2, got an array of \(1,\)"):
        StatsTable.empty(2).group([0], 3)
    with pytest.raises(UsageError, match="need as many keys"):
        StatsTable.empty(2).group([0, 3], 3)
    with pytest.raises(FormatError, match="unknown format 'fp17'"):
        TensorStats.empty().ask("fp17")


def test_readable_text():
    record = stats_of(np.array([0.0, 1.0, -6.0, math.nan, math.inf]))
    assert str(record) == (
        "5 values (fp32): amax 6, smallest non-zero 1, rms 3.512, binades 2^0 to 2^2; 1 zeros; 1 +inf; 1 nan"
    )
    assert (record.mean, record.nonfinite, record.binades) == (pytest.approx(-5 / 3), 2, (0, 2))
    assert str(TensorStats.empty()) == "0 values (none)"
    assert math.isnan(TensorStats.empty().mean) and math.isnan(TensorStats.empty().rms)
    assert TensorStats.empty().binades is None
    text = str(stats_of(np.array([65521.0, 40000.0, 1.1, 1e-9])).ask("fp16"))
    assert text.startswith("overflow 25.000% to 50.000%, flushed 25.000%, subnormal 0.000%, SQNR ")


def test_records_can_be_compared_with_anything():
    assert TensorStats.empty() != 3
    with pytest.raises(TypeError):
        TensorStats.empty() + 3


@pytest.mark.slow
def test_fifty_thousand_rows_answer_in_a_second():
    n = 50_000
    rng = np.random.default_rng(0)
    table = StatsTable.empty(n)
    table.counts[:, 100:150] = rng.integers(0, 1000, (n, 50))
    table.amax[:], table.amin_nonzero[:], table.sumsq[:] = 2.0 ** (149 + EXP_LO), 2.0 ** (100 + EXP_LO), 1.0
    table.source[:] = np.array(["fp32", "bf16"] * (n // 2), dtype=object)
    start = time.process_time()  # other processes do not count
    table.ask("e4m3", scale_exponent=3)
    assert time.process_time() - start < 1.0


def test_reading_statistics_needs_no_torch():
    code = (
        "import sys, precscope.stats, precscope.histogram; assert not {'torch', 'numba', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert EXP_HI - EXP_LO + 1 == BINS


def test_a_constant_tensor_with_an_infinite_gradient_is_not_priced():
    stats = TensorStats.empty()
    stats = dataclasses.replace(stats, counts=np.eye(1, BINS, -EXP_LO, dtype=np.int64)[0] * 4, amax=1.0,
                                amin_nonzero=1.0, sum=4.0, sumsq=4.0, source="fp32")  # fmt: skip
    weights = np.zeros(BINS)
    weights[-EXP_LO] = np.inf
    answer = dataclasses.replace(stats, weights=weights).ask("bf16")
    assert np.isnan(answer.loss_noise)
