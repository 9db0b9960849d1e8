"""The Triton kernels. `span` is the heart: what one program does with its share of one tensor.

Two walks. The first one takes each value at its face: exponent fields into the table, the largest and the smallest
magnitude as integers, and fp32 sums of the few values that a thread holds, added up in fp64. Some fifteen instructions
per value. Where the extremes then tell that there was more to it - inf or nan, subnormals of fp32 or bf16 (their field
says nothing), magnitudes whose squares leave fp32 - the program walks its share once more and looks at each value in
fp64. fp64 tensors take a walk of that kind alone.

Integers. With bits b of fp32, 2 b (mod 2^32) orders magnitudes, the sign dropped; -2 b (mod 2^32) orders them the other
way round with zero at the bottom, so that its maximum is the smallest non-zero magnitude.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..histogram import BINS, EXP_LO
from .reference import AMAX, AMIN, NAN, NEG_INF, POS_INF, SUM, SUMSQ, WIDTH, ZEROS
from .triton_table import FIELDS, RATIO, STEP, THREADS, WIDE, count_fields, count_rows, declare, empty, fold

# kind: 0 fp32, 1 bf16, 2 fp16, 3 fp64. A thread reads VECTOR values of 16 bytes at a time, GROUPS times over.
GROUPS = (4, 2, 2, 2)
VECTOR = (4, 8, 8, 2)
LINE = 8  # words of a line of a table of work: address, address before, values, slot, slot of ratios, k, part, parts

_THREADS = tl.constexpr(THREADS)
_BINS, _EXP_LO, _WIDTH = tl.constexpr(BINS), tl.constexpr(EXP_LO), tl.constexpr(WIDTH)
_ZEROS, _POS_INF, _NEG_INF, _NAN = (tl.constexpr(c) for c in (ZEROS, POS_INF, NEG_INF, NAN))
_AMAX, _AMIN, _SUM, _SUMSQ = (tl.constexpr(c) for c in (AMAX, AMIN, SUM, SUMSQ))
_LINE = tl.constexpr(LINE)
# Twice the bits of fp32 inf, of the smallest normal number, and of 2^-48 and 2^60: between these, squares of the
# largest values are normal, and what smaller ones lose below the smallest subnormal is nothing beside them.
_INF2, _NORMAL2, _LEAST2, _MOST2 = (tl.constexpr(field << 24) for field in (255, 1, 127 - 48, 127 + 60))
# Rows of the table in the second walk: subnormals by their binade, 0 to 22; then
_ROW_POS, _ROW_NEG, _ROW_NAN, _ROW_PLAIN = (tl.constexpr(row) for row in (32, 33, 34, 255))


@triton.jit
def _bits32(x, kind: tl.constexpr):
    """A block of fp32, bf16 or fp16 as bits of fp32, int32: exact. bf16 is the upper half of fp32, subnormals too."""
    if kind == 1:
        return x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _value32(pointer, before, at, inside, masked: tl.constexpr, kind: tl.constexpr, update: tl.constexpr):
    """(as loaded, bits of fp32, bits of the value before or none) of a block; of an update these are its difference."""
    x = tl.load(pointer + at, mask=inside, other=0.0) if masked else tl.load(pointer + at)
    bits = _bits32(x, kind)
    if update:
        old = tl.load(before + at, mask=inside, other=0.0) if masked else tl.load(before + at)
        weight = _bits32(old, kind)
        bits = (bits.to(tl.float32, bitcast=True) - weight.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        return x, bits, weight
    else:
        return x, bits, bits


@triton.jit
def _binade32(bits):
    """floor(log2) of the magnitude of fp32 bits, for any but zero; 128 for inf and nan."""
    magnitude = bits & 0x7FFFFFFF
    # a subnormal is its bits times 2^-149, and that integer converts to a normal fp32 value
    of_integer = (magnitude.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127 - 149
    return tl.where(magnitude < 0x00800000, of_integer, (magnitude >> 23) - 127)


@triton.jit
def _ratio_row(step, weight):
    """Row of the table for floor(log2|step|) - floor(log2|weight|), fp32 bits: the difference + 256, clamped to what a
    row of accumulators holds; the zeros, infinities and nans of such a row as 0, 1 and 2."""
    moved = tl.minimum(tl.maximum(_binade32(step) - _binade32(weight), _EXP_LO), _EXP_LO + _BINS - 1) + 256
    moved = tl.where((weight & 0x7FFFFFFF) == 0, 1, moved)
    moved = tl.where((step & 0x7FFFFFFF) == 0, 0, moved)
    defined = ((step & 0x7FFFFFFF) < 0x7F800000) & ((weight & 0x7FFFFFFF) < 0x7F800000)
    return tl.where(defined, moved, 2)


@triton.jit
def _per_thread(x):
    """The sum of a block [groups, threads, vector] over what each thread holds."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _most(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _first_walk(
    state, pointer, before, at, inside, masked: tl.constexpr, kind: tl.constexpr, update: tl.constexpr,
    ptx: tl.constexpr,
):  # fmt: skip
    counts, ratios, largest, smallest, total, squares = state
    x, bits, weight = _value32(pointer, before, at, inside, masked, kind, update)
    counts = count_fields(counts, x, bits, kind, STEP if update else FIELDS, ptx)
    if update:
        ratios = count_rows(ratios, _ratio_row(bits, weight), RATIO, ptx)
    largest = tl.maximum(largest, _most((bits * 2).to(tl.uint32, bitcast=True)))
    smallest = tl.maximum(smallest, _most((bits * -2).to(tl.uint32, bitcast=True)))
    value = bits.to(tl.float32, bitcast=True)
    total += _per_thread(value).to(tl.float64)
    squares += _per_thread(value * value).to(tl.float64)
    return counts, ratios, largest, smallest, total, squares


@triton.jit
def _second_walk(
    state, pointer, before, at, inside, kind: tl.constexpr, update: tl.constexpr, ptx: tl.constexpr
):  # fmt: skip
    counts, largest, total, squares = state
    _, bits, _ = _value32(pointer, before, at, inside, True, kind, update)
    magnitude = bits & 0x7FFFFFFF
    subnormal = (magnitude > 0) & (magnitude < 0x00800000)
    row = tl.where(subnormal, _binade32(bits) + 149, _ROW_PLAIN)
    row = tl.where(magnitude == 0x7F800000, tl.where(bits < 0, _ROW_NEG, _ROW_POS), row)
    row = tl.where(magnitude > 0x7F800000, _ROW_NAN, row)
    counts = count_rows(counts, row, STEP if update else FIELDS, ptx)
    finite = magnitude < 0x7F800000
    largest = tl.maximum(largest, _most(tl.where(finite, bits * 2, 0).to(tl.uint32, bitcast=True)))
    value = tl.where(finite, bits, 0).to(tl.float32, bitcast=True).to(tl.float64)
    return counts, largest, total + _per_thread(value), squares + _per_thread(value * value)


@triton.jit
def _add_to_row(row, largest, smallest, total, squares, k):
    """Extremes and sums, fp64 numbers, times 2^k, to the row of accumulators."""
    scale = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    # positive floats order like their bits
    tl.atomic_max(row + _AMAX, (largest * scale).to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_min(row + _AMIN, (smallest * scale).to(tl.int64, bitcast=True), sem="relaxed")
    numbers = row.to(tl.pointer_type(tl.float64), bitcast=True)
    tl.atomic_add(numbers + _SUM, total * scale, sem="relaxed")
    tl.atomic_add(numbers + _SUMSQ, squares * scale * scale, sem="relaxed")


@triton.jit
def _add_binades(row, binade, counts, wanted):
    """counts: int32, one for each of `binade`; those not wanted are left out."""
    column = tl.minimum(tl.maximum(binade, _EXP_LO), _EXP_LO + _BINS - 1) - _EXP_LO
    tl.atomic_add(row + column, counts.to(tl.int64), mask=wanted & (counts > 0), sem="relaxed")


@triton.jit
def _float64_of(doubled):
    """The fp32 magnitude whose bits, doubled, are given (int64), as fp64."""
    return (doubled >> 1).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _add_ratios(row, counts):
    index = tl.arange(0, 512)
    _add_binades(row, index - 256, counts, index > 2)
    column = tl.where(index == 0, _ZEROS, tl.where(index == 1, _POS_INF, _NAN))
    tl.atomic_add(row + column, counts.to(tl.int64), mask=(index < 3) & (counts > 0), sem="relaxed")


@triton.jit
def _span32(
    rows, pointer, before, n, slot, ratio_slot, k, part, parts,
    kind: tl.constexpr, update: tl.constexpr, ptx: tl.constexpr, groups: tl.constexpr, vector: tl.constexpr,
):  # fmt: skip
    use: tl.constexpr = STEP if update else FIELDS
    block: tl.constexpr = groups * _THREADS * vector
    thread = tl.arange(0, _THREADS)
    at = tl.arange(0, groups)[:, None, None] * (_THREADS * vector) + thread[None, :, None] * vector
    at = at + tl.arange(0, vector)[None, None, :]
    counts, ratios = empty(use, ptx), tl.zeros([512], dtype=tl.int32)
    none, nothing = tl.zeros([_THREADS], dtype=tl.uint32), tl.zeros([_THREADS], dtype=tl.float64)
    state = (counts, ratios, none, none, nothing, nothing)
    start = part.to(tl.int64) * block
    stride = parts.to(tl.int64) * block
    while start + block <= n:
        state = _first_walk(state, pointer, before, start + at, at, False, kind, update, ptx)
        start += stride
    padding = tl.where(start < n, start + block - n, 0).to(tl.int32)  # zeros read beyond the end
    if start < n:
        state = _first_walk(state, pointer, before, start + at, start + at < n, True, kind, update, ptx)
    counts, ratios, largest, smallest, total, squares = state

    row = rows + slot.to(tl.int64) * _WIDTH
    field = tl.arange(0, 256)
    counts = fold(counts, use, ptx)
    counts = tl.where(field == 0, counts - padding, counts)
    _add_binades(row, field - 127 + k, counts, (field > 0) & (field < 255))
    if update:
        ratios = fold(ratios, RATIO, ptx)
        _add_ratios(rows + ratio_slot.to(tl.int64) * _WIDTH, tl.where(tl.arange(0, 512) == 0, ratios - padding, ratios))
    zeros = tl.sum(tl.where(field == 0, counts, 0))
    most, least = tl.max(largest), tl.max(smallest)
    least = (0 - least.to(tl.int64)) & 0xFFFFFFFF  # 0 where all is zero
    most = most.to(tl.int64)
    strange = (most >= _MOST2) | ((least > 0) & (least < _NORMAL2)) | ((most > 0) & (most < _LEAST2))
    if strange:
        again = (empty(use, ptx), none, nothing, nothing)
        start = part.to(tl.int64) * block
        while start < n:
            again = _second_walk(again, pointer, before, start + at, start + at < n, kind, update, ptx)
            start += stride
        counts, largest, total, squares = again
        counts = fold(counts, use, ptx)
        most = tl.max(largest).to(tl.int64)
        _add_binades(row, field - 149 + k, counts, field < 32)
        zeros -= tl.sum(tl.where(field < 32, counts, 0))
        column = tl.where(field == _ROW_POS, _POS_INF, tl.where(field == _ROW_NEG, _NEG_INF, _NAN))
        special = (field >= _ROW_POS) & (field <= _ROW_NAN) & (counts > 0)
        tl.atomic_add(row + column, counts.to(tl.int64), mask=special, sem="relaxed")
    if zeros > 0:
        tl.atomic_add(row + _ZEROS, zeros.to(tl.int64), sem="relaxed")
    if most > 0:  # some value is finite and not zero
        _add_to_row(row, _float64_of(most), _float64_of(least), tl.sum(total), tl.sum(squares), k)


@triton.jit
def _walk64(state, pointer, at, inside, masked: tl.constexpr, k, ptx: tl.constexpr):
    counts, largest, smallest, total, squares = state
    x = tl.load(pointer + at, mask=inside, other=0.0) if masked else tl.load(pointer + at)
    bits = x.to(tl.int64, bitcast=True)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    finite, zero = magnitude < 0x7FF0000000000000, magnitude == 0
    binade = (magnitude >> 52).to(tl.int32) - 1023 + k
    column = tl.minimum(tl.maximum(binade, _EXP_LO), _EXP_LO + _BINS - 1) - _EXP_LO
    column = tl.where(zero, _ZEROS, column)
    special = tl.where(magnitude > 0x7FF0000000000000, _NAN, tl.where(bits < 0, _NEG_INF, _POS_INF))
    column = tl.where(finite, column, special)
    if masked:
        column = tl.where(inside, column, 511)
    counts = count_rows(counts, column, WIDE, ptx)
    largest = tl.maximum(largest, _most(tl.where(finite, magnitude, 0)))
    smallest = tl.minimum(smallest, tl.min(tl.min(tl.where(zero, 0x7FF0000000000000, magnitude), 2), 0))
    value = tl.where(finite, x, 0.0)
    return counts, largest, smallest, total + _per_thread(value), squares + _per_thread(value * value)


@triton.jit
def _span64(
    rows, pointer, n, slot, k, part, parts, ptx: tl.constexpr, groups: tl.constexpr, vector: tl.constexpr
):  # fmt: skip
    block: tl.constexpr = groups * _THREADS * vector
    at = tl.arange(0, groups)[:, None, None] * (_THREADS * vector) + tl.arange(0, _THREADS)[None, :, None] * vector
    at = at + tl.arange(0, vector)[None, None, :]
    counts = empty(WIDE, ptx)
    largest = tl.zeros([_THREADS], dtype=tl.int64)
    smallest = tl.full([_THREADS], 0x7FF0000000000000, dtype=tl.int64)
    total, squares = tl.zeros([_THREADS], dtype=tl.float64), tl.zeros([_THREADS], dtype=tl.float64)
    state = (counts, largest, smallest, total, squares)
    start = part.to(tl.int64) * block
    while start + block <= n:
        state = _walk64(state, pointer, start + at, at >= 0, False, k, ptx)
        start += parts.to(tl.int64) * block
    if start < n:
        state = _walk64(state, pointer, start + at, start + at < n, True, k, ptx)
    counts, largest, smallest, total, squares = state
    row = rows + slot.to(tl.int64) * _WIDTH
    column = tl.arange(0, 512)
    counts = fold(counts, WIDE, ptx)
    tl.atomic_add(row + column, counts.to(tl.int64), mask=(column < _BINS + 4) & (counts > 0), sem="relaxed")
    most = tl.max(largest)
    if most > 0:
        least = tl.min(smallest).to(tl.float64, bitcast=True)
        _add_to_row(row, most.to(tl.float64, bitcast=True), least, tl.sum(total), tl.sum(squares), k)


@triton.jit(do_not_specialize=["n", "slot", "ratio_slot", "k"])
def one_kernel(
    rows, pointer, before, n, slot, ratio_slot, k,
    kind: tl.constexpr, update: tl.constexpr, ptx: tl.constexpr, groups: tl.constexpr, vector: tl.constexpr,
):  # fmt: skip
    """One tensor, or one update, shared by all programs. before: `pointer` again where there is none."""
    declare(ptx)
    part, parts = tl.program_id(0), tl.num_programs(0)
    if kind == 3:
        _span64(rows, pointer, n, slot, k, part, parts, ptx, groups, vector)
    else:
        _span32(
            rows, pointer, before, n, slot, ratio_slot, k, part, parts, kind, update, ptx, groups, vector
        )  # fmt: skip


@triton.jit
def _address(word, kind: tl.constexpr, aligned: tl.constexpr):
    """An int64 of a table of work as a pointer."""
    if kind == 0:
        pointer = word.to(tl.pointer_type(tl.float32), bitcast=True)
    elif kind == 1:
        pointer = word.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    elif kind == 2:
        pointer = word.to(tl.pointer_type(tl.float16), bitcast=True)
    else:
        pointer = word.to(tl.pointer_type(tl.float64), bitcast=True)
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def many_kernel(
    rows, work, aligned: tl.constexpr,
    kind: tl.constexpr, update: tl.constexpr, ptx: tl.constexpr, groups: tl.constexpr, vector: tl.constexpr,
):  # fmt: skip
    """Many tensors: program i does line i of `work`, int64 [programs, LINE]. aligned: all start at multiples of 16."""
    declare(ptx)
    line = work + tl.program_id(0) * _LINE
    pointer = _address(tl.load(line), kind, aligned)
    n, slot, k = tl.load(line + 2), tl.load(line + 3), tl.load(line + 5).to(tl.int32)
    part, parts = tl.load(line + 6), tl.load(line + 7)
    if kind == 3:
        _span64(rows, pointer, n, slot, k, part, parts, ptx, groups, vector)
    else:
        before = _address(tl.load(line + 1), kind, aligned)
        _span32(
            rows, pointer, before, n, slot, tl.load(line + 4), k, part, parts, kind, update, ptx, groups, vector
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "slot"])
def weights_kernel(
    weights, y_pointer, g_pointer, n, slot, kind: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """A block of activations fills some twenty binades: one masked sum of g^2 for each, none for the others."""
    columns = tl.arange(0, 512)
    sums = tl.zeros([512], dtype=tl.float64)
    start = tl.program_id(0).to(tl.int64) * block
    while start < n:
        offsets = start + tl.arange(0, block)
        inside = offsets < n
        y = tl.load(y_pointer + offsets, mask=inside, other=0.0)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(tl.float64)
        if kind == 3:
            magnitude = y.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
            kept = (magnitude > 0) & (magnitude < 0x7FF0000000000000)
            binade = (magnitude >> 52).to(tl.int32) - 1023
        else:
            bits = y.to(tl.int32, bitcast=True)
            kept = ((bits & 0x7FFFFFFF) > 0) & ((bits & 0x7FFFFFFF) < 0x7F800000)
            binade = _binade32(bits)
        column = tl.minimum(tl.maximum(binade, _EXP_LO), _EXP_LO + _BINS - 1) - _EXP_LO
        column = tl.where(kept, column, -1)
        at = tl.min(tl.where(kept, column, 512))
        last = tl.max(column)
        while at <= last:
            sums += tl.where(columns == at, tl.sum(tl.where(column == at, g * g, 0.0)), 0.0)
            at += 1
        start += tl.num_programs(0).to(tl.int64) * block
    row = weights + slot.to(tl.int64) * _BINS
    tl.atomic_add(row + columns, sums, mask=(columns < _BINS) & (sums != 0.0), sem="relaxed")
