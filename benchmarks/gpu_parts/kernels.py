"""Single operations: one-pass statistics beside the bytes they read, and matrix products by format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from precscope.applying.scaled import cast, missing_on
from precscope.kernels import SlotBuffer
from precscope.rounding import quantize

from .setting import DTYPES, Setting

COLD = 256 * 2**20
"""Bytes over which calls go in turn, so that none finds its tensor in the cache (50 MB on an H100)."""


def kernels(setting: Setting) -> None:
    """Time by size and dtype. share: floor over time, the floor being bytes read and written over copy bandwidth."""
    bandwidth = setting.copy_bandwidth()
    setting.keep(copy_bytes_per_s=bandwidth)
    rows: list[dict[str, Any]] = []
    for megabytes in (0.25, 1, 4, 16, 64, 256) if setting.cuda else (0.25, 1):
        for name, dtype in DTYPES.items():
            size = int(megabytes * 2**20)
            copies = min(max(COLD // size, 1), 64) if setting.cuda else 1
            xs = [torch.randn(size // dtype.itemsize, device=setting.device).to(dtype) for _ in range(copies)]
            for kernel, (call, traffic) in _kernels_on(xs, setting).items():
                spent, timed = setting.device_ms(call, copies)
                floor = 1e3 * traffic / bandwidth
                rows.append({"kernel": kernel, "megabytes": megabytes, "dtype": name, "ms": spent, "timed": timed,
                             "bytes": traffic, "floor_ms": floor, "share": floor / spent})  # fmt: skip
            setting.keep(rows=rows)
    setting.keep(many=_many(setting, bandwidth))


def _kernels_on(xs: list[Tensor], setting: Setting) -> dict[str, tuple[Callable[[int], object], int]]:
    """Kernel -> (call with the number of a tensor, bytes that it must move)."""
    buffer, size = SlotBuffer(setting.device, 4), xs[0].numel() * xs[0].element_size()
    afters, gs = [x * 1.01 for x in xs], [torch.randn_like(x) for x in xs]
    buffer.accumulate_weights(0, xs[0], gs[0])  # makes its rows
    found: dict[str, tuple[Callable[[int], object], int]] = {
        "accumulate": (lambda i: buffer.accumulate(0, xs[i]), size),
        "torch.sum": (lambda i: xs[i].sum(), size),
        "accumulate_update": (lambda i: buffer.accumulate_update(1, 2, xs[i], afters[i]), 2 * size),
        "accumulate_weights": (lambda i: buffer.accumulate_weights(3, xs[i], gs[i]), 2 * size),
    }
    if xs[0].dtype is not torch.float16:
        found["quantize e4m3"] = (lambda i: quantize(xs[i], "e4m3"), 2 * size)
        # amax reads it, the cast reads it again and writes codes twice
        both_ways = 2 * size + 2 * xs[0].numel()
        found["8-bit cast, both ways"] = (lambda i: cast(xs[i].view(-1, 256), "e4m3", columns=True), both_ways)
    return found


def _many(setting: Setting, bandwidth: float) -> dict[str, Any]:
    """64 tensors of 256 kB: one launch for all beside a launch for each."""
    tensors = [torch.randn(2**16, device=setting.device) for _ in range(64)]
    buffer, slots = SlotBuffer(setting.device, 64), list(range(64))

    def each() -> None:
        for slot, x in zip(slots, tensors, strict=True):
            buffer.accumulate(slot, x)

    one = {"one launch": lambda: buffer.accumulate_many(slots, tensors)}
    calls: dict[str, Callable[[], object]] = {"a launch each": each, **one}
    floor = 1e3 * 64 * 2**18 / bandwidth
    spent = setting.median_ms(calls)
    return {"tensors": 64, "bytes_each": 2**18, "floor_ms": floor, "ms": spent}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether fp32 matrix products of CUDA may be TF32's."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def matmuls(setting: Setting) -> None:
    """The GPT's products (forward) by format: e4m3 alone, and with the casts of both operands; with the accumulation
    that plans take and with the faster one."""
    config, rows = setting.config, []
    m, width = setting.tokens, config.width
    shapes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width),
              "head": (width, config.vocabulary)}  # fmt: skip
    for name, (k, n) in shapes.items():
        a, b = torch.randn(m, k, device=setting.device), torch.randn(n, k, device=setting.device)
        calls: dict[str, Callable[[], object]] = {"fp32": lambda a=a, b=b: a @ b.T}
        for word in ("bf16", "fp16") if setting.cuda else ("bf16",):
            low = a.to(DTYPES[word]), b.to(DTYPES[word])
            calls[word] = lambda low=low: low[0] @ low[1].T
        if not missing_on(setting.device):
            calls |= _in_8_bits(a.bfloat16(), b)
        with tf32(False):
            spent = {word: setting.device_ms(lambda i, call=call: call(), 10)[0] for word, call in calls.items()}
        if setting.cuda:
            with tf32(True):
                spent["tf32"] = setting.device_ms(lambda i, call=calls["fp32"]: call(), 10)[0]
        rate = {word: 2e-9 * m * k * n / ms for word, ms in spent.items()}  # 1e12 FLOP/s
        rows.append({"product": name, "shape": [m, k, n], "ms": spent, "tflops": rate})
        setting.keep(rows=rows)


def _in_8_bits(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    x, w = cast(a, "e4m3"), cast(b, "e4m3")
    assert x.rows is not None and w.rows is not None

    def product(fast: bool) -> Tensor:
        return torch._scaled_mm(
            x.rows, w.rows.t(), scale_a=x.scale, scale_b=w.scale, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    def with_casts() -> Tensor:
        cast(a, "e4m3"), cast(b, "e4m3")
        return product(False)

    return {"e4m3": lambda: product(False), "e4m3, fast sums": lambda: product(True), "e4m3 with casts": with_casts}
