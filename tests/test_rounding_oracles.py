"""quantize against three independent implementations: gfloat, ml_dtypes (with numpy) and torch's own casts.

quantize is written twice, as compiled code and as torch operations: `both_ways` runs both and demands the same bits.

Each comparison demands equality of every bit, the sign of zero included; only NaNs count as equal whatever their
payload. Where an oracle follows another policy, the test says which values it leaves out and why.
"""

from __future__ import annotations

from functools import lru_cache

import gfloat
import gfloat.formats as gformats
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.types import Domain

from precscope import rounding as rounding_module
from precscope.formats import get_format
from precscope.rounding import quantize

FORMATS = ("fp16", "bf16", "tf32", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m1")
NUMPY_DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "e3m2": np.dtype(ml_dtypes.float6_e3m2fn),
    "e2m3": np.dtype(ml_dtypes.float6_e2m3fn),
    "e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
}
CONTAINERS = {torch.float16: NUMPY_DTYPES["fp16"], torch.bfloat16: NUMPY_DTYPES["bf16"]}
GFLOAT_MODES = {"nearest_even": gfloat.RoundMode.TiesToEven, "toward_zero": gfloat.RoundMode.TowardZero}


def _gfloat_format(
    name: str, bits: int, precision: int, bias: int, domain: Domain, has_nz: bool, nans: int
) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        name, bits, precision, bias=bias, domain=domain, has_nz=has_nz, num_high_nans=nans,
        is_signed=True, has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip


GFLOAT_FORMATS = {
    "fp32": gformats.format_info_binary32,
    "fp16": gformats.format_info_binary16,
    "bf16": gformats.format_info_bfloat16,
    "tf32": _gfloat_format("tf32", 19, 11, 127, Domain.Extended, True, 2**10 - 1),
    "e4m3": gformats.format_info_ocp_e4m3,
    "e5m2": gformats.format_info_ocp_e5m2,
    "e4m3fnuz": _gfloat_format("e4m3fnuz", 8, 4, 8, Domain.Finite, False, 0),
    "e5m2fnuz": _gfloat_format("e5m2fnuz", 8, 3, 16, Domain.Finite, False, 0),
    "e3m2": gformats.format_info_ocp_e3m2,
    "e2m3": gformats.format_info_ocp_e2m3,
    "e2m1": gformats.format_info_ocp_e2m1,
}

every_format = pytest.mark.parametrize("name", FORMATS)
every_mode = pytest.mark.parametrize("rounding", GFLOAT_MODES)
both_policies = pytest.mark.parametrize("saturate", [False, True], ids=["overflow", "saturate"])


# --- inputs -----------------------------------------------------------------------------------------------------


@lru_cache
def spread_float32() -> np.ndarray:
    """2^20 random bit patterns, all exponents and NaNs alike, and 2^16 float32 subnormals."""
    rng = np.random.default_rng(20)
    bits = rng.integers(0, 2**32, 2**20, dtype=np.uint32)
    tiny = rng.integers(0, 2**23, 2**16, dtype=np.uint32) | (rng.integers(0, 2, 2**16, dtype=np.uint32) << 31)
    return np.concatenate([bits, tiny]).view(np.float32)


@lru_cache
def boundaries(name: str) -> np.ndarray:
    """float64: the values of the format and of the rest of its top binade, every tie between two of them, specials.

    Formats of more than 64 binades: the 8 lowest, the 8 highest and every eighth between."""
    fmt = get_format(name)
    binades = np.arange(fmt.emin, fmt.emax + 1)
    if binades.size > 64:
        binades = np.concatenate([binades[:8], binades[8:-8:8], binades[-8:]])
    steps = np.arange(2**fmt.precision) * 2.0**-fmt.precision
    subnormal = steps * fmt.smallest_normal
    values = np.concatenate([subnormal, *((1 + steps) * 2.0**e for e in binades)])
    lowest = np.repeat([fmt.smallest_normal, *(2.0**binades)], steps.size)
    ulps = lowest * 2.0**-fmt.precision
    special = [np.inf, np.nan, 0.0, fmt.max, fmt.overflow_from, *(fmt.smallest_subnormal * 2.0 ** -np.arange(1, 9))]
    magnitudes = np.concatenate([values, values + ulps / 2, [values[-1] + ulps[-1]], special])
    return np.concatenate([magnitudes, -magnitudes])


def with_neighbours(values: np.ndarray) -> np.ndarray:
    """`values` and the numbers of their dtype just above and below."""
    with np.errstate(all="ignore"):
        return np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)]).astype(
            values.dtype
        )


def as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


@lru_cache
def spread_float64() -> np.ndarray:
    """2^17 random bit patterns, and 2^17 values with all 52 bits in use over the exponents of float32."""
    rng = np.random.default_rng(64)
    bits = rng.integers(0, 2**64, 2**17, dtype=np.uint64).view(np.float64)
    significands, exponents = rng.uniform(-2, 2, 2**17), rng.integers(-150, 129, 2**17)
    return np.concatenate([bits, np.ldexp(significands, exponents)])


def codes(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


# --- comparison -------------------------------------------------------------------------------------------------


def by_gfloat(x: np.ndarray, name: str, rounding: str, saturate: bool, scale_exponent: int = 0) -> np.ndarray:
    """float64. gfloat raises on overflow of formats with neither inf nor NaN, for which quantize saturates."""
    saturate = saturate or not get_format(name).has_nan
    with np.errstate(all="ignore"):
        scaled = np.ldexp(x.astype(np.float64), scale_exponent)
        rounded = gfloat.round_ndarray(GFLOAT_FORMATS[name], scaled, GFLOAT_MODES[rounding], saturate)
        return np.ldexp(rounded.astype(np.float64), -scale_exponent)


def both_ways(x: torch.Tensor, name: str, **options) -> torch.Tensor:
    """quantize, after comparing what its compiled form and its torch operations give."""
    got = quantize(x, name, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding_module, "_compiled", lambda: None)
        assert_same(quantize(x, name, **options), got.double().numpy(), x.double().numpy())
    return got


def assert_same(got: torch.Tensor, want: np.ndarray, x: np.ndarray) -> None:
    """Bitwise equality in float64 (which holds every value of every container), NaN equal to NaN."""
    got = got.double().numpy()
    same = ((got == want) & (np.signbit(got) == np.signbit(want))) | (np.isnan(got) & np.isnan(want))
    wrong = np.flatnonzero(~same)
    examples = [(float(x[i]), float(got[i]), float(want[i])) for i in wrong[:5]]
    assert wrong.size == 0, f"{wrong.size} of {x.size} differ; (input, got, wanted): {examples}"


def test_the_comparison_sees_one_wrong_value_and_a_wrong_sign_of_zero() -> None:
    x = np.array([1.0, -0.0, np.nan])
    assert_same(torch.from_numpy(x), x, x)
    for wrong in ([1.0, 0.0, np.nan], [np.nextafter(1, 2), -0.0, np.nan], [1.0, -0.0, 0.0], [np.nan, -0.0, np.nan]):
        with pytest.raises(AssertionError, match="1 of 3 differ"):
            assert_same(torch.tensor(wrong, dtype=torch.float64), x, x)


@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_gfloat_means_the_same_format(name: str) -> None:
    fmt, other = get_format(name), GFLOAT_FORMATS[name]
    assert (other.max, other.smallest_normal, other.smallest_subnormal) == (
        fmt.max,
        fmt.smallest_normal,
        fmt.smallest_subnormal,
    )
    assert (other.domain == Domain.Extended, other.num_nans > 0, other.has_nz) == (
        fmt.has_inf,
        fmt.has_nan,
        fmt.signed_zero,
    )


# --- gfloat -----------------------------------------------------------------------------------------------------


@every_format
@every_mode
@both_policies
def test_float32_against_gfloat(name: str, rounding: str, saturate: bool) -> None:
    x = np.concatenate([spread_float32(), with_neighbours(as_float32(boundaries(name)))])
    got = both_ways(torch.from_numpy(x), name, rounding=rounding, saturate=saturate)
    assert got.dtype == torch.float32
    assert_same(got, by_gfloat(x, name, rounding, saturate), x)


@every_format
@every_mode
@both_policies
def test_float32_with_scale_against_gfloat(name: str, rounding: str, saturate: bool) -> None:
    for k in (-120, -9, 6, 130):
        edges = as_float32(np.ldexp(boundaries(name)[::7], -k))
        x = np.concatenate([spread_float32()[:: 2**5], with_neighbours(edges)])
        got = both_ways(torch.from_numpy(x), name, rounding=rounding, saturate=saturate, scale_exponent=k)
        assert_same(got, as_float32(by_gfloat(x, name, rounding, saturate, k)).astype(np.float64), x)


@every_format
@every_mode
@both_policies
@pytest.mark.parametrize("dtype", CONTAINERS, ids=str)
def test_every_16_bit_code_against_gfloat(dtype: torch.dtype, name: str, rounding: str, saturate: bool) -> None:
    x = codes(dtype)
    for k in (-10, 0, 7):
        got = both_ways(x, name, rounding=rounding, saturate=saturate, scale_exponent=k)
        assert got.dtype == dtype
        exact = by_gfloat(x.double().numpy(), name, rounding, saturate, k)
        with np.errstate(all="ignore"):  # beyond the container's range: its inf
            want = exact.astype(CONTAINERS[dtype]).astype(np.float64)
        assert_same(got, want, x.double().numpy())


@pytest.mark.parametrize("name", ("fp32", *FORMATS))
@every_mode
@both_policies
def test_float64_against_gfloat(name: str, rounding: str, saturate: bool) -> None:
    x = np.concatenate([spread_float64(), with_neighbours(boundaries(name if name != "fp32" else "tf32"))])
    got = both_ways(torch.from_numpy(x), name, rounding=rounding, saturate=saturate)
    assert_same(got, by_gfloat(x, name, rounding, saturate), x)


# --- ml_dtypes and numpy ----------------------------------------------------------------------------------------


def by_ml_dtypes(x: np.ndarray, name: str) -> np.ndarray:
    """A cast there and back, nearest even. Its overflow is ours with saturate=False for all of these formats."""
    with np.errstate(all="ignore"):
        return x.astype(NUMPY_DTYPES[name]).astype(np.float64)


def ml_dtypes_input(x: np.ndarray, name: str) -> np.ndarray:
    """Without NaN where the format has none: quantize keeps it in the container, ml_dtypes turns it into a zero."""
    return x if get_format(name).has_nan else x[~np.isnan(x)]


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "tf32"])
@both_policies
def test_float32_against_ml_dtypes(name: str, saturate: bool) -> None:
    x = np.concatenate([spread_float32(), with_neighbours(as_float32(boundaries(name)))])
    x = ml_dtypes_input(x, name)
    largest = np.float32(get_format(name).max)
    limited = np.clip(x, -largest, largest) if saturate else x  # ml_dtypes has no saturating cast: clip first
    assert_same(both_ways(torch.from_numpy(x), name, saturate=saturate), by_ml_dtypes(limited, name), x)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "tf32"])
@pytest.mark.parametrize("dtype", CONTAINERS, ids=str)
def test_every_16_bit_code_against_ml_dtypes(dtype: torch.dtype, name: str) -> None:
    x = codes(dtype).view(torch.int16).numpy().view(CONTAINERS[dtype])
    with np.errstate(all="ignore"):
        wide = ml_dtypes_input(x.astype(np.float32), name)
        narrow = wide.astype(CONTAINERS[dtype])
        want = narrow.astype(NUMPY_DTYPES[name]).astype(CONTAINERS[dtype]).astype(np.float64)
    assert_same(both_ways(torch.from_numpy(wide).to(dtype), name), want, wide)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_float64_against_numpy(name: str) -> None:
    """Only numpy's own types: from float64 the casts of ml_dtypes and of torch go through float32 and round twice."""
    x = np.concatenate([spread_float64(), with_neighbours(boundaries("fp16"))])
    assert_same(both_ways(torch.from_numpy(x), name), by_ml_dtypes(x, name), x)


# --- torch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"])
@pytest.mark.parametrize("scale_exponent", [0, 3])
def test_float32_against_torch_casts_where_nothing_overflows(name: str, scale_exponent: int) -> None:
    """Beyond the largest finite value torch's 8-bit casts differ from version to version and are left out."""
    fmt = get_format(name)
    x = np.concatenate([spread_float32(), with_neighbours(as_float32(boundaries(name)))])
    x = torch.from_numpy(x[np.abs(x) <= fmt.max * 2.0**-scale_exponent])
    scaled = (x.double() * 2.0**scale_exponent).float()
    x = x[scaled.double() == x.double() * 2.0**scale_exponent]
    want = (x * 2.0**scale_exponent).to(getattr(torch, fmt.torch_dtype_name)).double() * 2.0**-scale_exponent
    assert x.numel() > 2**16
    assert_same(both_ways(x, name, scale_exponent=scale_exponent), want.numpy(), x.numpy())


@pytest.mark.parametrize("name", ["fp64", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_wider_formats_change_nothing(name: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(spread_float32()).to(dtype)
    assert_same(both_ways(x, name), x.double().numpy(), x.double().numpy())
