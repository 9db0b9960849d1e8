"""The one-pass kernels on the CPU: what numba compiles. What is launched, and on which threads, says cpu.py.

Values are read block by block (a block stays in the first-level cache): one vectorised loop for the extremes, as
integers; one for sum and sum of squares in float64; one scalar loop that counts exponent fields in four interleaved
tables, because a counter that was just written cannot be read again at once. Where the exponents of a block lie within
31 binades, as they mostly do, that loop counts pairs of values in tables of 32 x 32: half as many steps. Blocks with
subnormals or non-finite values take a slower second look. fp16 and bf16 are widened to fp32 block by block with integer
operations, so that a denormals-are-zero mode of the processor changes no count.

Sums are taken per block, then per chunk of fixed length, then over chunks in order: they do not depend on the number
of threads.
"""

from __future__ import annotations

import math

import numba as nb
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..histogram import BINS, EXP_LO
from .reference import AMAX, AMIN, INF_BITS, NAN, NEG_INF, POS_INF, SUM, SUMSQ, WIDTH, ZEROS

if nb.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

# One file on purpose: numba recompiles cached code when this file changes, not when one that it imports does.

BLOCK = 4096  # elements: 16 KiB of fp32
CHUNK = 32768  # elements between two foldings of the exponent tables; the unit of work of a thread
PAIRS_FROM = 16384  # elements from which tables of pairs pay
PARALLEL_FROM = 65536  # elements from which a second thread pays

FP32, BF16, FP16, FP64 = range(4)

_REASSOCIATE = {"reassoc", "contract", "nsz"}  # lets sums be vectorised; inf and nan keep their meaning
_U1, _U255 = np.uint32(1), np.uint32(255)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)
_FRACTION = np.uint32(0x007FFFFF)
_NORMAL = np.uint32(0x00800000)
_NONE = np.uint32(0xFFFFFFFF)
_REBIAS = np.uint32(112 << 23)  # exponent bias 15 to 127


@intrinsic
def _pointer(context, address):
    """An integer address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.PointerType(ir.IntType(8)))

    return types.voidptr(types.intp), generate


@intrinsic
def _bits32(context, number):
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float64(context, bits):
    """The float64 with these bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _claim(context, address):
    """Atomically add 1 to the int64 at `address`; its value before."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.intp), generate


@njit
def _exponent32(magnitude):
    """floor(log2) of the fp32 value with these bits, sign cleared; finite and not zero."""
    field = np.int64(magnitude >> np.uint32(23))
    if field:
        return field - 127
    bits = np.int64(magnitude)  # a subnormal is bits * 2^-149
    exponent = -150
    while bits:
        bits >>= 1
        exponent += 1
    return exponent


@njit
def _value32(magnitude):
    """float64 value of these fp32 bits, sign cleared; finite."""
    field = np.int64(magnitude >> np.uint32(23))
    fraction = np.int64(magnitude & _FRACTION)
    return math.ldexp(np.float64(fraction | 0x800000), field - 150) if field else math.ldexp(np.float64(fraction), -149)


@njit
def _column(exponent):
    """Column of a binade in a row."""
    return min(max(exponent - EXP_LO, 0), BINS - 1)


@njit
def _extremes(values, largest, smallest, k):
    """Keep the larger of AMAX and the smaller of AMIN, each times 2^k."""
    values[AMAX] = max(values[AMAX], math.ldexp(largest, k))
    values[AMIN] = min(values[AMIN], math.ldexp(smallest, k))


@njit(fastmath=_REASSOCIATE)
def _sums(x):
    total, squares = 0.0, 0.0
    for i in range(np.uint64(x.size)):
        value = np.float64(x[i])
        total += value
        squares += value * value
    return total, squares


@njit
def _count_fields32(bits, table):
    """Count exponent fields: uint32 [n] into uint32 [4 * 256]."""
    whole = np.uint64(bits.size // 4 * 4)
    shift = np.uint32(23)
    for i in range(np.uint64(0), whole, np.uint64(4)):
        table[np.uint64((bits[i] >> shift) & _U255)] += _U1
        table[np.uint64(((bits[i + np.uint64(1)] >> shift) & _U255) + np.uint32(256))] += _U1
        table[np.uint64(((bits[i + np.uint64(2)] >> shift) & _U255) + np.uint32(512))] += _U1
        table[np.uint64(((bits[i + np.uint64(3)] >> shift) & _U255) + np.uint32(768))] += _U1
    for i in range(whole, np.uint64(bits.size)):
        table[np.uint64((bits[i] >> shift) & _U255)] += _U1


# Counts of pairs: four tables of 32 x 32, then the field below the window of 31 that they cover, and whether they count
# anything yet. Place 0 of a pair is a zero, place j the field of that number above the one below the window.
_SIDE, _TABLES = 32, 4
_BASE, _COUNTED, _PAIRS = _SIDE * _SIDE * _TABLES, _SIDE * _SIDE * _TABLES + 1, _SIDE * _SIDE * _TABLES + 2
_S5, _S16, _S32, _S48 = np.uint32(5), np.uint64(16), np.uint64(32), np.uint64(48)
_PLACE = np.uint64(0x3FF)


@njit
def _count_pairs32(bits, pairs, places):
    """Count exponent fields by pairs: uint32 [BLOCK], each zero or within the window. places: scratch, uint16
    [BLOCK / 2]."""
    half, shift, base = np.uint64(BLOCK // 2), np.uint32(23), pairs[_BASE]
    for i in range(half):
        a = max((bits[i] >> shift) & _U255, base) - base
        b = max((bits[i + half] >> shift) & _U255, base) - base
        places[i] = np.uint16(a | (b << _S5))
    four = places.view(np.uint64)
    for i in range(np.uint64(BLOCK // 8)):
        word = four[i]
        pairs[word & _PLACE] += _U1
        pairs[((word >> _S16) & _PLACE) + np.uint64(1024)] += _U1
        pairs[((word >> _S32) & _PLACE) + np.uint64(2048)] += _U1
        pairs[(word >> _S48) + np.uint64(3072)] += _U1
    pairs[_COUNTED] = _U1


@njit
def _window(largest, smallest, pairs, row, k):
    """Whether the fields between those of two magnitudes, normal numbers or zeros, can be counted by pairs; moves the
    window to where they are."""
    top, bottom = np.int64(largest >> np.uint32(23)), np.int64(smallest >> np.uint32(23))
    base = np.int64(pairs[_BASE])
    if top < base + _SIDE and (bottom > base or not top):
        return True
    if top - bottom >= _SIDE - 1:
        return False
    _fold_pairs(pairs, row, k)
    pairs[_BASE] = np.uint32(max(bottom - 1 - (_SIDE - 2 - (top - bottom)) // 2, 0))
    return True


@njit
def _fold_pairs(pairs, row, k):
    """Empty the counts of pairs into the row."""
    if not pairs[_COUNTED]:
        return
    for i in range(_SIDE * _SIDE):
        count = np.int64(pairs[i]) + np.int64(pairs[i + 1024]) + np.int64(pairs[i + 2048]) + np.int64(pairs[i + 3072])
        if count:
            for place in (i // _SIDE, i % _SIDE):
                row[_column(np.int64(pairs[_BASE]) + place - 127 + k) if place else ZEROS] += count
    pairs[:_BASE] = 0
    pairs[_COUNTED] = 0


@njit
def _specials32(bits, x, row, k):
    """A block that has subnormals or non-finite values: counts these into `row` and returns
    (largest finite, subnormals, sum, sum of squares)."""
    largest, subnormals, total, squares = np.uint32(0), 0, 0.0, 0.0
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & _MAGNITUDE)
        if magnitude >= _INF:
            if magnitude > _INF:
                row[NAN] += 1
            elif bits[i] == magnitude:
                row[POS_INF] += 1
            else:
                row[NEG_INF] += 1
            continue
        largest = max(largest, magnitude)
        if magnitude and magnitude < _NORMAL:
            subnormals += 1
            row[_column(_exponent32(magnitude) + k)] += 1
        value = np.float64(x[i])
        total += value
        squares += value * value
    return largest, subnormals, total, squares


@njit
def _block32(bits, x, row, values, table, pairs, places, k):
    """Statistics of one block of fp32, seen as uint32 `bits` and as float32 `x`: fields into `table` or `pairs`, the
    rest into the row. Returns (sum, sum of squares, subnormals counted in the row)."""
    largest, smallest = np.uint32(0), _NONE
    for i in range(np.uint64(bits.size)):
        magnitude = np.uint32(bits[i] & _MAGNITUDE)
        largest = max(largest, magnitude)
        smallest = min(smallest, np.uint32(magnitude - _U1))  # zero wraps to the largest integer
    subnormals, usual = 0, largest < _INF and smallest >= _NORMAL - _U1
    if (
        usual
        and pairs.size == _PAIRS
        and bits.size == BLOCK
        and _window(largest, np.uint32(smallest + _U1), pairs, row, k)
    ):
        _count_pairs32(bits, pairs, places)
    else:
        _count_fields32(bits, table)
    if not usual:
        largest, subnormals, total, squares = _specials32(bits, x, row, k)
    else:
        total, squares = _sums(x)
    if smallest < _INF - _U1:  # some value is finite and not zero
        _extremes(values, _value32(largest), _value32(np.uint32(smallest + _U1)), k)
    return total, squares, subnormals


@njit
def _fold32(table, row, subnormals, k):
    """Empty the tables of exponent fields into the row. Field 255 was counted apart, and so were subnormals."""
    row[ZEROS] += np.int64(table[0]) + np.int64(table[256]) + np.int64(table[512]) + np.int64(table[768]) - subnormals
    for field in range(1, 255):
        count = np.int64(table[field]) + table[field + 256] + table[field + 512] + table[field + 768]
        if count:
            row[_column(field - 127 + k)] += count
    table[:] = 0


@njit
def _widen(kind, source, out):
    """bf16 or fp16, as uint16, to the bits of fp32: the same values, by integer operations (no denormals)."""
    if kind == BF16:
        for i in range(np.uint64(source.size)):
            out[i] = np.uint32(source[i]) << np.uint32(16)
        return
    for i in range(np.uint64(source.size)):
        half = np.uint32(source[i])
        magnitude = np.uint32(half & np.uint32(0x7FFF))
        rebias = _REBIAS * _U1 if magnitude < np.uint32(0x7C00) else _REBIAS * np.uint32(2)  # inf, nan: topmost field
        normal = np.uint32((magnitude << np.uint32(13)) + rebias)
        subnormal = _bits32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
        bits = subnormal if magnitude < np.uint32(0x0400) else normal
        out[i] = bits | ((half & np.uint32(0x8000)) << np.uint32(16))


@njit
def _chunk32(kind, address, start, stop, row, values, table, pairs, places, buffer, k):
    """Elements start..stop of the tensor at `address`, at most CHUNK: returns (sum, sum of squares)."""
    total, squares, subnormals = 0.0, 0.0, 0
    for begin in range(start, stop, BLOCK):
        n = min(BLOCK, stop - begin)
        if kind == FP32:
            bits = nb.carray(_pointer(address + 4 * begin), n, np.uint32)
        else:
            bits = buffer[:n]
            _widen(kind, nb.carray(_pointer(address + 2 * begin), n, np.uint16), bits)
        s, q, tiny = _block32(bits, bits.view(np.float32), row, values, table, pairs, places, k)
        total += s
        squares += q
        subnormals += tiny
    _fold32(table, row, subnormals, k)
    return total, squares


@njit
def _chunk64(address, start, stop, row, values, table, k):
    """Elements start..stop of the fp64 tensor at `address`: returns (sum, sum of squares). table: uint32 [2 * 2048]."""
    bits = nb.carray(_pointer(address + 8 * start), stop - start, np.int64)
    x = nb.carray(_pointer(address + 8 * start), stop - start, np.float64)
    magnitude_mask, infinity = np.int64(0x7FFF_FFFF_FFFF_FFFF), np.int64(INF_BITS)
    largest, smallest, bad = np.int64(-1), infinity, False
    for i in range(np.uint64(bits.size)):
        magnitude = bits[i] & magnitude_mask
        bad |= magnitude >= infinity
        largest = max(largest, magnitude if magnitude < infinity else np.int64(-1))
        smallest = min(smallest, magnitude if magnitude else infinity)
        table[((np.uint64(i) & np.uint64(1)) << np.uint64(11)) + np.uint64(magnitude >> 52)] += _U1
    if not bad:
        total, squares = _sums(x)
    else:
        total, squares = 0.0, 0.0
        for i in range(bits.size):
            if (bits[i] & magnitude_mask) < infinity:
                total += x[i]
                squares += x[i] * x[i]
            elif x[i] != x[i]:
                row[NAN] += 1
            else:
                row[POS_INF if x[i] > 0 else NEG_INF] += 1
    zeros = 0
    if table[0] or table[2048]:
        for i in range(bits.size):
            zeros += (bits[i] & magnitude_mask) == 0
    row[ZEROS] += zeros
    row[_column(-1023 + k)] += np.int64(table[0]) + np.int64(table[2048]) - zeros
    for field in range(1, 2047):
        row[_column(field - 1023 + k)] += np.int64(table[field]) + np.int64(table[field + 2048])
    table[:] = 0
    if smallest < infinity:
        _extremes(values, _float64(largest), _float64(smallest), k)
    return total, squares


@njit
def _count_ratios(weight, step, row, table):
    """floor(log2|step|) - floor(log2|weight|), both as fp32 bits [n], into table uint32 [2 * 512] and the row."""
    for i in range(np.uint64(weight.size)):
        w, dw = np.uint32(weight[i] & _MAGNITUDE), np.uint32(step[i] & _MAGNITUDE)
        if _NORMAL <= w < _INF and _NORMAL <= dw < _INF:
            difference = np.int64(dw >> np.uint32(23)) - np.int64(w >> np.uint32(23)) + 256
            table[((np.uint64(i) & np.uint64(1)) << np.uint64(9)) + np.uint64(difference)] += _U1
        elif w >= _INF or dw >= _INF:
            row[NAN] += 1
        elif dw == 0:
            row[ZEROS] += 1
        elif w == 0:
            row[POS_INF] += 1
        else:
            row[_column(_exponent32(dw) - _exponent32(w))] += 1


@njit
def _chunk_update(
    kind, before, after, start, stop, row, values, ratio_row, table, pairs, places, ratios, weight, step
):  # fmt: skip
    """Elements start..stop of the update after - before (addresses): statistics of the difference into `row`, ratios
    into `ratio_row`; returns (sum, sum of squares). weight, step: uint32 [BLOCK] scratch."""
    total, squares, subnormals = 0.0, 0.0, 0
    for begin in range(start, stop, BLOCK):
        n = min(BLOCK, stop - begin)
        if kind == FP32:
            w = nb.carray(_pointer(before + 4 * begin), n, np.uint32)
            new = nb.carray(_pointer(after + 4 * begin), n, np.uint32)
        else:
            w, new = weight[:n], step[:n]
            _widen(kind, nb.carray(_pointer(before + 2 * begin), n, np.uint16), w)
            _widen(kind, nb.carray(_pointer(after + 2 * begin), n, np.uint16), new)
        old_value, new_value, difference = w.view(np.float32), new.view(np.float32), step[:n].view(np.float32)
        for i in range(np.uint64(n)):
            difference[i] = new_value[i] - old_value[i]
        s, q, tiny = _block32(step[:n], difference, row, values, table, pairs, places, 0)
        _count_ratios(w, step[:n], ratio_row, ratios)
        total += s
        squares += q
        subnormals += tiny
    _fold32(table, row, subnormals, 0)
    for difference in range(512):
        count = np.int64(ratios[difference]) + np.int64(ratios[difference + 512])
        if count:
            ratio_row[_column(difference - 256)] += count
    ratios[:] = 0
    return total, squares


# A job: int64 [JOB]. The first two words are counters that threads claim from. _ROW and _RATIO are addresses of the
# rows of the first thread, _STRIDE the bytes to those of the next one, _SUMS the address of float64 [chunks, 2].
# _BEFORE is 0 unless the job is an update.
_WORKER, _CHUNK, _KIND, _BEFORE, _AFTER, _SIZE, _SHIFT, _ROW, _RATIO, _STRIDE, _SUMS, _JOB = range(12)


@njit("void(intp)", nogil=True, cache=True)
def _work(address):
    """Take chunks of the job at `address` until none is left: what each thread does."""
    job = nb.carray(_pointer(address), _JOB, np.int64)
    offset = _claim(address + 8 * _WORKER) * job[_STRIDE]
    kind, size, k = job[_KIND], job[_SIZE], job[_SHIFT]
    row = nb.carray(_pointer(job[_ROW] + offset), WIDTH, np.int64)
    values = nb.carray(_pointer(job[_ROW] + offset), WIDTH, np.float64)
    ratio_row = nb.carray(_pointer(job[_RATIO] + offset), WIDTH, np.int64)
    chunks = (size + CHUNK - 1) // CHUNK
    sums = nb.carray(_pointer(job[_SUMS]), (chunks, 2), np.float64)
    table = np.zeros(4096 if kind == FP64 else 1024, np.uint32)
    ratios = np.zeros(1024 if job[_BEFORE] else 1, np.uint32)
    weight, step = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    pairs = np.zeros(_PAIRS if kind != FP64 and size >= PAIRS_FROM else 1, np.uint32)
    places = np.empty(BLOCK // 2, np.uint16)
    while True:
        chunk = _claim(address + 8 * _CHUNK)
        if chunk >= chunks:
            break
        start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, size)
        if job[_BEFORE]:
            total, squares = _chunk_update(
                kind, job[_BEFORE], job[_AFTER], start, stop, row, values, ratio_row, table, pairs, places, ratios,
                weight, step,
            )  # fmt: skip
        elif kind == FP64:
            total, squares = _chunk64(job[_AFTER], start, stop, row, values, table, k)
        else:
            total, squares = _chunk32(kind, job[_AFTER], start, stop, row, values, table, pairs, places, step, k)
        sums[chunk, 0], sums[chunk, 1] = total, squares
    if pairs.size == _PAIRS:
        _fold_pairs(pairs, row, k)


@nb.cfunc("void(intp)", cache=True)
def thread(address):
    """The entry point of an OpenMP thread."""
    _work(address)


@njit
def _add_sums(values, sums, k):
    total, squares = 0.0, 0.0
    for chunk in range(len(sums)):
        total += sums[chunk, 0]
        squares += sums[chunk, 1]
    values[SUM] += math.ldexp(total, k)
    values[SUMSQ] += math.ldexp(squares, 2 * k)


@njit("void(intp, intp, intp, intp, intp, intp, intp)", nogil=True, cache=True)
def serial(kind, before, after, size, k, row, ratio):
    """A whole job on the calling thread, straight into the rows at addresses `row` and `ratio`."""
    sums = np.empty(((size + CHUNK - 1) // CHUNK, 2))
    job = np.zeros(_JOB, np.int64)
    job[_KIND], job[_BEFORE], job[_AFTER], job[_SIZE], job[_SHIFT] = kind, before, after, size, k
    job[_ROW], job[_RATIO], job[_SUMS] = row, ratio, sums.ctypes.data
    _work(job.ctypes.data)
    _add_sums(nb.carray(_pointer(row), WIDTH, np.float64), sums, k)


@njit("void(int64[:, :, ::1], float64[:, ::1], intp, intp, intp)", nogil=True, cache=True)
def gather(parts, sums, k, row, ratio):
    """Add the rows of all threads, int64 [threads, 2, WIDTH], and the sums of all chunks to the rows at addresses."""
    for part in range(2 if ratio else 1):
        address = ratio if part else row
        counts = nb.carray(_pointer(address), WIDTH, np.int64)
        for thread in range(len(parts)):
            for column in range(AMAX):
                counts[column] += parts[thread, part, column]
    bits = nb.carray(_pointer(row), WIDTH, np.int64)
    for thread in range(len(parts)):
        bits[AMAX] = max(bits[AMAX], parts[thread, 0, AMAX])  # positive floats order like their bits
        bits[AMIN] = min(bits[AMIN], parts[thread, 0, AMIN])
    _add_sums(nb.carray(_pointer(row), WIDTH, np.float64), sums, k)


# A list of jobs: int64 [2] with the counter from which threads claim and the number of lines, then the lines: kind,
# address, elements, k, address of the row.
LINE = 5


@njit("void(intp)", nogil=True, cache=True)
def work_many(address):
    """Take whole tensors of the list at `address` until none is left."""
    count = nb.carray(_pointer(address), 2, np.int64)[1]
    lines = nb.carray(_pointer(address + 16), (count, LINE), np.int64)
    while True:
        i = _claim(address)
        if i >= count:
            return
        serial(lines[i, 0], 0, lines[i, 1], lines[i, 2], lines[i, 3], lines[i, 4], 0)


@nb.cfunc("void(intp)", cache=True)
def thread_many(address):
    """The entry point of an OpenMP thread."""
    work_many(address)
