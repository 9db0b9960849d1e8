"""Formats: every derived number against the libraries that implement the format, and look-up by name."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from precscope.errors import FormatError, UsageError
from precscope.formats import FloatFormat, format_names, get_format

LIBRARY_DTYPES = {
    "fp64": np.float64,
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", LIBRARY_DTYPES)
def test_derived_numbers_equal_those_of_ml_dtypes_and_numpy(name: str) -> None:
    fmt, info = get_format(name), ml_dtypes.finfo(LIBRARY_DTYPES[name])
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.eps == float(info.eps)
    assert fmt.bits == info.bits
    assert fmt.precision == info.nmant


def test_tf32_is_fp16_precision_with_fp32_range() -> None:
    tf32, fp16, fp32 = get_format("tf32"), get_format("fp16"), get_format("fp32")
    assert (tf32.precision, tf32.emin, tf32.emax) == (fp16.precision, fp32.emin, fp32.emax)
    assert tf32.max == (2 - 2.0**-10) * 2.0**127


@pytest.mark.parametrize("name", [n for n in format_names() if get_format(n).torch_dtype_name])
def test_torch_dtype_name_names_a_dtype_of_the_same_range(name: str) -> None:
    fmt = get_format(name)
    assert torch.finfo(getattr(torch, fmt.torch_dtype_name)).max == fmt.max


@pytest.mark.parametrize("name", ["tf32", "e3m2", "e2m3", "e2m1"])
def test_formats_that_torch_cannot_store_have_no_dtype_name(name: str) -> None:
    assert get_format(name).torch_dtype_name is None


@pytest.mark.parametrize(
    ("name", "overflow_from", "at_midpoint"),
    [("fp16", 65520.0, True), ("e4m3", 464.0, False), ("e5m2", 61440.0, True), ("e4m3fnuz", 248.0, True)],
)
def test_overflow_begins_halfway_to_the_value_that_would_follow(
    name: str, overflow_from: float, at_midpoint: bool
) -> None:
    fmt = get_format(name)
    assert fmt.overflow_from == overflow_from
    assert fmt.overflows(overflow_from) is at_midpoint
    assert fmt.overflows(np.nextafter(overflow_from, np.inf))
    assert not fmt.overflows(np.nextafter(overflow_from, 0))


def test_ulp_exponent_stops_falling_below_the_smallest_normal_binade() -> None:
    fp16 = get_format("fp16")
    assert [fp16.ulp_exponent(e) for e in (0, -14, -15, -24)] == [-10, -24, -24, -24]
    assert fp16.flush_below == 2.0**-25


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("float16", "fp16"),
        ("half", "fp16"),
        ("torch.bfloat16", "bf16"),
        (" BF16 ", "bf16"),
        ("float8_e4m3fn", "e4m3"),
        ("float8-e5m2", "e5m2"),
        ("TF32", "tf32"),
        ("float6_e3m2fn", "e3m2"),
        ("fp4", "e2m1"),
        (torch.float16, "fp16"),
        (torch.float8_e4m3fnuz, "e4m3fnuz"),
    ],
)
def test_aliases(alias: object, name: str) -> None:
    assert get_format(alias).name == name


def test_a_format_is_returned_as_it_is() -> None:
    own = FloatFormat("e4m2", 7, 2, -6, 7, 224.0, has_inf=True)
    assert get_format(own) is own


def test_every_listed_name_is_known() -> None:
    assert [get_format(name).name for name in format_names()] == list(format_names())
    assert str(get_format("half")) == "fp16"


@pytest.mark.parametrize(
    ("given", "hint"), [("fp15", "fp16"), ("bfloat61", "bfloat16"), ("e4m4", "e4m3"), ("float8_e4m3", "float8_e4m3fn")]
)
def test_unknown_format_names_the_nearest_and_all_that_exist(given: str, hint: str) -> None:
    with pytest.raises(FormatError) as error:
        get_format(given)
    message = str(error.value)
    assert message.startswith(f"unknown format {given!r} (did you mean ")
    assert hint in message.split("?")[0]
    assert message.endswith("known formats: " + ", ".join(format_names()))


def test_unknown_format_without_a_near_name_suggests_none() -> None:
    with pytest.raises(FormatError) as error:
        get_format("q8_0")
    assert "did you mean" not in str(error.value)
    assert isinstance(error.value, UsageError)
    assert error.value.exit_code == 2


def test_a_format_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_format("fp16").max = 1.0
