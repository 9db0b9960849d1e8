"""One pass over a tensor: exponent histogram, extremes, sums; on the device where the tensor is.

    stats = ps.summarize(x)                   # TensorStats of one tensor

    buffer = SlotBuffer(device)               # many tensors: a row of accumulators each
    buffer.accumulate(0, x)                   # never waits for the device
    buffer.accumulate_many(slots, tensors)    # the same for each of several: one launch for many small ones
    table = buffer.read()                     # StatsTable: one copy to the host

Three backends give the same counts and extremes: "numba" compiled for the CPU, "triton" for GPUs, and "torch"
operations, the readable reference, wherever the other two cannot run. Sums agree to float64 rounding, those of
"triton" to 2^-21 of the sum of magnitudes (triton.py says where it is more exact).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, first_line
from ..histogram import BINS
from ..stats import MIXED, NOTHING, StatsTable, TensorStats
from . import compiled, reference

__all__ = ["SlotBuffer", "backend_for", "summarize"]

Backend = Literal["auto", "torch", "numba", "triton"]
_MODULES = {"torch": "reference", "numba": "cpu", "triton": "triton"}
_NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_WIDENED = {
    getattr(torch, long): short
    for long, short in {
        "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float8_e4m3fnuz": "e4m3fnuz", "float8_e5m2fnuz": "e5m2fnuz",
    }.items()
    if hasattr(torch, long)
}  # fmt: skip


def backend_for(device: str | torch.device = "cpu") -> str:
    """Which backend reduces tensors of `device`: "numba" on the CPU, "triton" on CUDA, else "torch" and why."""
    name, why = _choose(torch.device(device).type)
    return f"{name} ({why})" if why else name


def summarize(x: Tensor, *, backend: Backend = "auto") -> TensorStats:
    """The statistics of one tensor: see TensorStats.

    x: floating point of 8 to 64 bits, any shape, stride and device, not complex; sparse tensors count their implicit
    zeros. Waits for the device. backend: "auto" takes the fastest that can run, see `backend_for`.
    Raises UsageError for other tensors, and for a backend that cannot run on x's device.
    """
    if not isinstance(x, Tensor):
        raise UsageError(f"summarize takes a torch.Tensor, got {type(x).__name__}: wrap it in torch.as_tensor(...)")
    buffer = SlotBuffer(x.device, capacity=1, backend=backend)
    buffer.accumulate(0, x)
    return TensorStats.from_table(buffer.read(), 0)


class SlotBuffer:
    """Rows of accumulators ("slots") on one device. Only `read` waits for the device.

    A slot takes any number of tensors; their statistics add up. It remembers the format of what it was given. One
    thread at a time may write a slot.

    torch.compile: `accumulate` and `accumulate_many` inside a compiled function become one operator of its graph,
    which breaks it nowhere (fullgraph=True), runs at each call, and counts what eager mode counts of the same numbers:

        buffer = SlotBuffer(device)

        @torch.compile(fullgraph=True)
        def forward(x):
            h = block(x)
            buffer.accumulate(0, h)           # h.detach() is read; gradients pass untouched
            return head(h)

    A watched tensor must exist in memory, so that the compiler fuses less around it, and results may differ in their
    last bits from those of the unwatched graph. Calls of `read`, `clear` and `grow` belong outside.

    CUDA graphs: calls may be captured once each kind of call has run outside, for Triton compiles then. A replay adds
    to the same slots what the same memory holds then. The buffer must outlive the graph and cannot `grow` after a
    capture; `clear` between replays is fine.
    """

    def __init__(self, device: str | torch.device, capacity: int = 256, *, backend: Backend = "auto") -> None:
        """device: where the tensors will be. capacity: rows to begin with (2.3 kB each)."""
        device = torch.device(device)
        if device.type == "meta":
            raise UsageError("a tensor on device meta has no values to reduce: give it a real device first")
        self._kernels = _load(backend, device.type)
        # Where there is no float64 (Apple's GPUs) tensors are reduced on the host.
        self._travels = device.type == "mps"
        with torch.inference_mode(False):  # made inside inference mode, rows could not be written outside
            self._rows = reference.new_rows(capacity, torch.device("cpu") if self._travels else device)
        self._home = self._rows.device
        self.device = device if self._travels else self._home
        self._on_gpu = self._home.type == "cuda"
        self._source = [NOTHING] * capacity
        self._exponent = [0] * capacity
        self._weights: Tensor | None = None  # float64 [capacity, BINS], made when first needed
        self._priced: set[int] = set()
        # What captured CUDA graphs do again at each replay: slot -> (source, exponent), priced slots, tables of work
        # and the pinned memory that they are copied from.
        self._replayed: dict[int, tuple[str, int]] = {}
        self._replayed_prices: set[int] = set()
        self._tables: list[Tensor] = []
        self.number = compiled.number(self)

    @property
    def capacity(self) -> int:
        """How many rows there are."""
        return len(self._source)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows; what was accumulated stays. UsageError once a CUDA graph writes into them."""
        more = capacity - self.capacity
        if more > 0:
            if self._replayed:
                raise UsageError(
                    f"a captured CUDA graph writes into the {self.capacity} rows of this buffer, which cannot move: "
                    f"make it with capacity={capacity} before the capture"
                )
            with torch.inference_mode(False):
                self._rows = torch.cat([self._rows, reference.new_rows(more, self._home)])
                if self._weights is not None:
                    self._weights = torch.cat([self._weights, self._weights.new_zeros(more, BINS)])
            self._source += [NOTHING] * more
            self._exponent += [0] * more

    def clear(self, n: int | None = None) -> None:
        """Empty the first n rows, all by default."""
        n = self.capacity if n is None else n
        self._rows[:n].copy_(reference.new_rows(1, self._home))  # one empty row, over all of them
        self._source[:n] = [NOTHING] * n
        self._exponent[:n] = [0] * n
        if self._weights is not None:
            self._weights[:n].zero_()
            self._priced = {slot for slot in self._priced if slot >= n} | self._replayed_prices
        for slot, (source, k) in self._replayed.items():
            if slot < n:
                self._source[slot], self._exponent[slot] = source, k

    def accumulate(self, slot: int, x: Tensor, *, multiplier: float = 1.0) -> None:
        """Add the statistics of x * multiplier to row `slot`.

        x: fp64, fp32, bf16, fp16 or fp8, any shape and stride, also empty. multiplier: finite and above 0; exact for
        powers of two (a divided-out loss scale), in float64 otherwise.
        """
        if torch.compiler.is_compiling():
            return compiled.accumulate(self._rows, x.detach(), self.number, slot, multiplier)
        return self._accumulate(self._rows, slot, x, multiplier)

    def _accumulate(self, rows: Tensor, slot: int, x: Tensor, multiplier: float) -> None:
        """Into `rows`: the buffer's own, or what a compiler puts in their place."""
        if x.dtype not in _NATIVE or x.layout is not torch.strided or x.device != rows.device:
            return self._accumulate_unusual(rows, slot, x, multiplier)
        source, k = _NATIVE[x.dtype], 0
        if multiplier != 1.0:
            x, source, k = _multiplied(x, source, multiplier)
        self._note(slot, source, k)
        self._kernels.accumulate(rows, slot, x.resolve_neg() if x.is_neg() else x, k)
        return None

    def accumulate_many(
        self, slots: Sequence[int], tensors: Sequence[Tensor], *, multipliers: Sequence[float] | None = None
    ) -> None:
        """`accumulate` for each slot and tensor, in order; faster where there are many small ones: one launch on a GPU,
        one round of the threads on the CPU.

        multipliers: one for each tensor, 1 by default. Raises UsageError where lengths differ.
        """
        factors = [1.0] * len(slots) if multipliers is None else multipliers
        if not len(slots) == len(tensors) == len(factors):
            raise UsageError(
                f"accumulate_many needs a slot, and a multiplier if any, for each tensor: got {len(slots)} slots, "
                f"{len(tensors)} tensors, {len(factors)} multipliers"
            )
        if torch.compiler.is_compiling():
            for slot, x, multiplier in zip(slots, tensors, factors, strict=True):
                compiled.accumulate(self._rows, x.detach(), self.number, slot, multiplier)
            return
        kept: list[int] = []
        values: list[Tensor] = []
        ks: list[int] = []
        rows, device = self._rows, self._rows.device
        for slot, x, multiplier in zip(slots, tensors, factors, strict=True):
            source, k = _NATIVE.get(x.dtype), 0
            if source is None or x.layout is not torch.strided or x.device != device:
                self._accumulate_unusual(rows, slot, x, multiplier)
                continue
            if multiplier != 1.0:
                x, source, k = _multiplied(x, source, multiplier)
            self._note(slot, source, k)
            kept.append(slot)
            values.append(x.resolve_neg() if x.is_neg() else x)
            ks.append(k)
        tables = self._kernels.accumulate_many(rows, kept, values, ks)
        if tables and self._capturing():
            self._tables += tables

    def accumulate_update(self, slot: int, ratio_slot: int, before: Tensor, after: Tensor) -> None:
        """Add the statistics of the update dw = after - before (in fp32; fp64 for fp64) to row `slot`.

        Row `ratio_slot` gets the histogram of floor(log2|dw|) - floor(log2|before|), its bins being that difference:
        what `swallowed_share` needs. There dw == 0 counts as a zero, before == 0 as +inf, anything non-finite as nan.
        """
        if before.shape != after.shape:
            raise UsageError(
                f"an update needs equal shapes, got {tuple(before.shape)} before and {tuple(after.shape)} after"
            )
        before, after = (_plain(t.detach(), self._home) for t in (before, after))
        wide = torch.float64 in (before.dtype, after.dtype)
        self._note(slot, "fp64" if wide else "fp32", 0)
        self._note(ratio_slot, "fp64" if wide else "fp32", 0)
        self._kernels.accumulate_update(self._rows, slot, ratio_slot, before, after)

    def accumulate_weights(self, slot: int, y: Tensor, g: Tensor) -> None:
        """Add the sum of g^2 over the elements of y in each binade to row `slot`'s gradient-weighted histogram.

        y: any tensor that `accumulate` takes, dense; only its exponents are read. g: the gradient of the loss with
        respect to it, of its shape and on its device, unscaled; not converted to a lower format. Zeros and non-finite
        elements of y add nothing (rounding them costs nothing, or is no noise); a non-finite gradient leaves inf or
        NaN.
        Raises UsageError where shapes or devices differ.
        """
        if y.shape != g.shape:
            raise UsageError(f"a gradient has the shape of its tensor, got {tuple(g.shape)} for {tuple(y.shape)}")
        self._check(slot)
        y, g = (_plain(t.detach(), self._home) for t in (y, g))
        wide = torch.float64 if torch.float64 in (y.dtype, g.dtype) else torch.float32
        y, g = _side_by_side(y, g)
        if self._weights is None:
            if self._capturing():
                raise UsageError(
                    "call accumulate_weights once before a CUDA graph captures it: the first call makes room"
                )
            with torch.inference_mode(False):
                self._weights = torch.zeros(self.capacity, BINS, dtype=torch.float64, device=self._home)
        self._priced.add(slot)
        if self._capturing():
            self._replayed_prices.add(slot)
        self._kernels.accumulate_weights(self._weights, slot, y.to(wide), g.to(wide))

    def _read_weights(self, n: int) -> np.ndarray | None:
        """float64 [n, BINS], NaN in the rows that were never given a gradient; None where none was."""
        if self._weights is None:
            return None
        weights = self._weights[:n].cpu().numpy().copy()
        weights[[row for row in range(n) if row not in self._priced]] = np.nan
        return weights

    def read(self, n: int | None = None, *, shared: bool = False) -> StatsTable:
        """The first n rows (all by default) as a StatsTable: one copy from the device, two where there are weights, and
        the only wait for it. `weights` is NaN in the rows that were given no gradient.

        shared: on the CPU no copy is made, and counts and sums are right only until the buffer is written or cleared.
        """
        n = self.capacity if n is None else n
        words = self._rows[:n].cpu().numpy()
        words = words.copy() if self._home.type == "cpu" and not shared else words
        numbers = words.view(np.float64)
        return StatsTable(
            counts=words[:, :BINS],
            zeros=words[:, reference.ZEROS],
            pos_inf=words[:, reference.POS_INF],
            neg_inf=words[:, reference.NEG_INF],
            nan=words[:, reference.NAN],
            amax=numbers[:, reference.AMAX],
            amin_nonzero=numbers[:, reference.AMIN],
            sum=numbers[:, reference.SUM],
            sumsq=numbers[:, reference.SUMSQ],
            source=np.array(self._source[:n], dtype=object),
            source_exponent=np.array(self._exponent[:n], dtype=np.int64),
            weights=self._read_weights(n),
        )

    def _check(self, slot: int) -> None:
        """The kernels write where they are told."""
        if not 0 <= slot < len(self._source):
            raise UsageError(
                f"this buffer has rows 0 to {len(self._source) - 1}, got slot {slot}: make room with grow(capacity)"
            )

    def _note(self, slot: int, source: str, k: int) -> None:
        self._check(slot)
        known = self._source[slot]
        if known == NOTHING:
            self._source[slot], self._exponent[slot] = source, k
        else:
            if known != source:
                self._source[slot] = MIXED
            self._exponent[slot] = min(self._exponent[slot], k)  # of the finest grid
        if self._on_gpu and self._capturing():
            self._replayed[slot] = self._source[slot], self._exponent[slot]

    def _capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def _accumulate_unusual(self, rows: Tensor, slot: int, x: Tensor, multiplier: float) -> None:
        """Sparse tensors, fp8, and tensors of another device than the rows."""
        if x.device != self._home and not self._travels:
            raise UsageError(f"this buffer is on {self.device}, the tensor on {x.device}: use a buffer per device")
        self._check(slot)
        source = _WIDENED.get(x.dtype)
        x = x.detach()
        if x.layout is not torch.strided:
            size = x.numel()
            x = (x.coalesce() if x.layout is torch.sparse_coo else x).values()
            rows[slot, reference.ZEROS] += size - x.numel()
        before, after = self._source[slot], _plain(x, self._home)
        self._accumulate(rows, slot, after, multiplier)
        if source is not None:  # say what it was, not what it was widened to
            self._source[slot] = source if before in (NOTHING, source) else MIXED


def _plain(x: Tensor, device: torch.device) -> Tensor:
    """x on `device` in a format that the kernels read: fp8 becomes fp32, which is exact. UsageError for non-floats."""
    if x.dtype in _WIDENED:
        x = x.float()
    if x.dtype not in _NATIVE:
        raise UsageError(
            f"statistics need a floating-point tensor of 8 to 64 bits, got {x.dtype}: convert it first, or leave it out"
        )
    return (x.resolve_neg() if x.is_neg() else x).to(device)


def _side_by_side(y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both as one contiguous dimension, element by element in the same order."""
    if y.stride() != g.stride() or not reference.fills_its_storage(y):
        y, g = y.contiguous(), g.contiguous()
    return reference.flat(y), reference.flat(g)


def _multiplied(x: Tensor, source: str, multiplier: float) -> tuple[Tensor, str, int]:
    """(y, source, k) with y * 2^k == x * multiplier; a multiplier that is no power of two leaves the source's grid."""
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise UsageError(f"multiplier must be finite and above 0, got {multiplier!r}")
    mantissa, exponent = math.frexp(multiplier)
    if mantissa == 0.5 and exponent > -1022:  # 2^k is then a normal number, of which the kernels make the bits
        return x, source, exponent - 1
    return x.detach().double() * multiplier, MIXED, 0


@cache
def _choose(device_type: str) -> tuple[str, str]:
    """Name of the fastest backend that can run for a device type, and why it is not a faster one, or ""."""
    wanted = {"cpu": "numba", "cuda": "triton"}.get(device_type, "torch")
    try:
        _module(wanted)
    except (ImportError, RuntimeError, OSError) as error:
        return "torch", f"{wanted} cannot be used: {first_line(error)}"
    return wanted, ""


def _load(backend: str, device_type: str) -> ModuleType:
    if backend == "auto":
        return _module(_choose(device_type)[0])
    if backend not in _MODULES:
        raise UsageError(f"unknown backend {backend!r}: it is auto, {', '.join(_MODULES)}")
    if backend == "numba" and device_type not in ("cpu", "mps"):
        raise UsageError(f"the numba backend reads tensors on the CPU, not on {device_type}: use backend='auto'")
    try:
        module = _module(backend)
    except ImportError as error:
        raise UsageError(f"backend {backend!r} cannot be used ({error}): install it, or use backend='torch'") from error
    if backend == "triton" and device_type != "cuda" and not module.INTERPRETED:
        raise UsageError(f"the triton backend reads tensors on a GPU, not on {device_type}: use backend='auto'")
    return module


@cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[backend]}", __name__)
