"""What the doctor says of this machine, against what it measured."""

from __future__ import annotations

import pytest

from precscope.doctor import describe, examine, rate_of
from precscope.errors import UsageError


def test_native_is_what_the_rate_shows():
    found = examine(device="cpu", size=384)
    rates = {r.format: r for r in found.rates}
    for name in ("bf16", "fp16"):
        assert rates[name].native == (rates[name].gflops >= rates["fp32"].gflops / 3)
        assert rates[name].note == ("" if rates[name].native else "no native instructions")
    assert rates["fp32"].native and not rates["e4m3"].native
    line = next(x for x in describe(found).splitlines() if x.startswith("fp16"))
    assert line.endswith("no native instructions") == (not rates["fp16"].native) and len(line) <= 80


@pytest.mark.parametrize(("gflops", "native"), [(1.2, False), (33.0, False), (34.0, True), (355.0, True)])
def test_a_third_of_fp32_is_the_border(gflops, native):
    rate = rate_of("fp16", gflops, fp32_gflops=100.0)
    assert rate.native is native and rate.note == ("" if native else "no native instructions")


@pytest.mark.parametrize("size", [0, -1, 15])
def test_too_small_a_size(size):
    with pytest.raises(UsageError, match=f"size must be an integer of 16 or more, not {size};"):
        examine(size=size)


def test_the_smallest_size():
    assert all(r.gflops > 0 for r in examine(device="cpu", size=16).rates[:3])
