"""Counting in shared memory, for the Triton kernels.

A program keeps one table of 32 kB: rows of counters, each counter spread over a word per lane of a warp (over 16 or 8
words, which lanes share, where more rows are needed). Lanes of one warp so hardly ever add to the same word, whatever
the values are, and a count costs the address - the exponent field in its place, the lane's number below it - and one
shared-memory addition. Triton has no operation that adds to shared memory at computed places, so this is PTX inline;
the table is declared in the kernel's own scope and lies beside the memory that Triton manages.

Where PTX cannot run (Triton's interpreter, AMD) `tl.histogram` counts into registers; all other code is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 16
THREADS = 32 * WARPS
_BYTES = 32768

# What the table is used for: (rows, words of each, first byte). FIELDS, or WIDE, or STEP and RATIO together.
_FIELDS, _WIDE, _STEP, _RATIO = (256, 32, 0), (512, 16, 0), (256, 16, 0), (512, 8, 16384)
FIELDS, WIDE, STEP, RATIO = (tl.constexpr(i) for i in range(4))
_USES = (_FIELDS, _WIDE, _STEP, _RATIO)


def _adding(use: tuple[int, int, int], *address: str) -> str:
    """PTX that counts once for each of `address`: instructions that leave row * bytes of a row in register a."""
    _, words, first = use
    lane = f"mov.u32 l, %laneid; and.b32 l, l, {words - 1}; shl.b32 l, l, 2; "
    base = f"mov.u32 b, precscope_table; add.u32 b, b, {first}; "
    count = "or.b32 a, a, l; add.u32 a, a, b; red.shared.add.u32 [a], 1; "
    return "{.reg .u32 a, b, l; " + lane + base + "".join(f"{step} {count}" for step in address) + "mov.u32 $0, 0;}"


def _folding(use: tuple[int, int, int], words: int) -> str:
    """PTX: the sum of `words` words from the ($1 * words)-th on. Neighbouring lanes begin at different banks."""
    quads = words // 4
    add = "".join(
        f"add.u32 q, $1, {i}; and.b32 q, q, {quads - 1}; shl.b32 q, q, 4; add.u32 q, q, a; "
        "ld.shared.v4.u32 {w0, w1, w2, w3}, [q]; "
        "add.u32 s, s, w0; add.u32 s, s, w1; add.u32 s, s, w2; add.u32 s, s, w3; "
        for i in range(quads)
    )
    start = f"mov.u32 a, precscope_table; add.u32 a, a, {use[2]}; mad.lo.u32 a, $1, {4 * words}, a; mov.u32 s, 0; "
    return "{.reg .u32 a, q, s, w<4>; " + start + add + "mov.u32 $0, s;}"


_DECLARE = tl.constexpr(f".shared .align 128 .b8 precscope_table[{_BYTES}]; mov.u32 $0, 0;")
_CLEAR = tl.constexpr(
    "{.reg .u32 a, t; mov.u32 t, %tid.x; mov.u32 a, precscope_table; mad.lo.u32 a, t, 16, a; bar.sync 0; "
    + "".join(f"st.shared.v4.u32 [a+{i}], {{0, 0, 0, 0}}; " for i in range(0, _BYTES, 16 * THREADS))
    + "bar.sync 0; mov.u32 $0, 0;}"
)
_WAIT = tl.constexpr("bar.sync 0; mov.u32 $0, 0;")
# The exponent field of fp32 bits, and of the two bf16 in a register, is its row; or the row itself is given.
_FIELD32, _FIELD32_STEP = (
    tl.constexpr(_adding(use, f"shr.u32 a, $1, {23 - shift}; and.b32 a, a, {255 << shift};"))
    for use, shift in ((_FIELDS, 7), (_STEP, 6))
)
_FIELD16 = tl.constexpr(_adding(_FIELDS, "and.b32 a, $1, 32640;", "shr.u32 a, $1, 16; and.b32 a, a, 32640;"))
_ROW_FIELDS, _ROW_WIDE, _ROW_STEP, _ROW_RATIO = (
    tl.constexpr(_adding(use, f"mul.lo.u32 a, $1, {4 * use[1]};")) for use in _USES
)
_FOLD_FIELDS = tl.constexpr(_folding(_FIELDS, 16))  # two threads a row
_FOLD_WIDE, _FOLD_STEP, _FOLD_RATIO = (tl.constexpr(_folding(use, use[1])) for use in _USES[1:])
_THREADS = tl.constexpr(THREADS)


@triton.jit
def declare(ptx: tl.constexpr):
    """Make the table: once in a kernel, before anything else."""
    if ptx:
        tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.arange(0, _THREADS)], tl.int32, False, 1)


@triton.jit
def empty(use: tl.constexpr, ptx: tl.constexpr):
    """Clear the table, all threads together; the counts in registers, zeros, that stand for it without PTX."""
    if ptx:
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [tl.arange(0, _THREADS)], tl.int32, False, 1)
    return tl.zeros([256 if use == FIELDS or use == STEP else 512], dtype=tl.int32)  # noqa: SIM109 - Triton has no `in`


@triton.jit
def count_fields(counts, x, bits, kind: tl.constexpr, use: tl.constexpr, ptx: tl.constexpr):
    """Count the exponent fields of `bits`, fp32 as int32, which are those of x as loaded if x is bf16 (kind 1)."""
    if not ptx:
        return counts + tl.histogram(tl.ravel((bits >> 23) & 255), 256)
    if use == STEP:
        tl.inline_asm_elementwise(_FIELD32_STEP, "=r,r", [bits], tl.int32, False, 1)
    elif kind == 1:
        tl.inline_asm_elementwise(_FIELD16, "=r,r", [x.to(tl.int16, bitcast=True)], tl.int16, False, 2)
    else:
        tl.inline_asm_elementwise(_FIELD32, "=r,r", [bits], tl.int32, False, 1)
    return counts


@triton.jit
def count_rows(counts, row, use: tl.constexpr, ptx: tl.constexpr):
    """Count `row`, int32 below the number of rows."""
    if not ptx:
        return counts + tl.histogram(tl.ravel(row), 256 if use == FIELDS or use == STEP else 512)  # noqa: SIM109 - Triton has no `in`
    if use == FIELDS:
        tl.inline_asm_elementwise(_ROW_FIELDS, "=r,r", [row], tl.int32, False, 1)
    elif use == STEP:
        tl.inline_asm_elementwise(_ROW_STEP, "=r,r", [row], tl.int32, False, 1)
    elif use == WIDE:
        tl.inline_asm_elementwise(_ROW_WIDE, "=r,r", [row], tl.int32, False, 1)
    else:
        tl.inline_asm_elementwise(_ROW_RATIO, "=r,r", [row], tl.int32, False, 1)
    return counts


@triton.jit
def fold(counts, use: tl.constexpr, ptx: tl.constexpr):
    """The counts of all rows, int32 [256] or [512]; waits for all threads' counts."""
    if not ptx:
        return counts
    tl.inline_asm_elementwise(_WAIT, "=r,r", [tl.arange(0, _THREADS)], tl.int32, False, 1)
    if use == FIELDS:
        halves = tl.inline_asm_elementwise(_FOLD_FIELDS, "=r,r", [tl.arange(0, 512)], tl.int32, False, 1)
        return tl.sum(tl.reshape(halves, [256, 2]), 1)
    elif use == STEP:
        return tl.inline_asm_elementwise(_FOLD_STEP, "=r,r", [tl.arange(0, 256)], tl.int32, False, 1)
    elif use == WIDE:
        return tl.inline_asm_elementwise(_FOLD_WIDE, "=r,r", [tl.arange(0, 512)], tl.int32, False, 1)
    else:
        return tl.inline_asm_elementwise(_FOLD_RATIO, "=r,r", [tl.arange(0, 512)], tl.int32, False, 1)
