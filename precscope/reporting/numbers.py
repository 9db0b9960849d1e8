"""Numbers as people read them: four significant digits, powers of two as 2^k, long names shortened in the middle.

templates/numbers.js holds the same rules, so that the page prints what Python prints. Ties round away from zero, as
JavaScript's toPrecision does.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_UP, Decimal

MISSING = "–"


def number(x: float | None) -> str:
    """Four significant digits; integers below 10^5 in full; an exponent below 10^-3 and from 10^5."""
    if x is None or x != x:
        return MISSING
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    sign, a = ("-" if x < 0 else ""), abs(x)
    if a == 0:
        return "0"
    if 1e-3 <= a < 1e5:
        digits = _significant(a)
        if digits is not None:
            return sign + digits
    mantissa, _, exponent = _scientific(a).partition("e")
    return f"{sign}{mantissa}e{int(exponent)}"


def _significant(a: float) -> str | None:
    """`a` in [10^-3, 10^5) with four significant digits and no trailing zeros; None where rounding leaves the range."""
    d = Decimal(a)
    if a < 1e4:
        text = format(d.quantize(Decimal(1).scaleb(d.adjusted() - 3), ROUND_HALF_UP), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    whole = int(d.quantize(Decimal(1), ROUND_HALF_UP))
    return str(whole) if whole < 100000 else None


def _scientific(a: float) -> str:
    d = Decimal(a)
    rounded = d.quantize(Decimal(1).scaleb(d.adjusted() - 3), ROUND_HALF_UP)
    exponent = rounded.adjusted()
    mantissa = format(rounded.scaleb(-exponent).quantize(Decimal("0.001"), ROUND_HALF_UP), "f")
    return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"


def figure(x: float | None) -> str:
    """Four significant digits, trailing zeros kept, so that figures of one column line up: 1.9 -> "1.900"."""
    if x is None or not math.isfinite(x) or not 1e-3 <= abs(x) < 1e4:
        return number(x)
    d = Decimal(abs(x))
    text = format(d.quantize(Decimal(1).scaleb(d.adjusted() - 3), ROUND_HALF_UP), "f")
    return ("-" if x < 0 else "") + text


def percent(share: float | None) -> str:
    """A share as percent without the sign: 0.1234567 -> "12.35"; "<0.0001" below one in a million."""
    if share is not None and 0 < share < 1e-6:
        return "<0.0001"
    return number(None if share is None else 100 * share)


def fixed(x: float | None, digits: int = 1) -> str:
    """A fixed number of digits after the point; "exact" where x is +inf (an SQNR without error)."""
    if x is None or x != x:
        return MISSING
    if math.isinf(x):
        return "exact" if x > 0 else "-inf"
    text = format(Decimal(abs(x)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP), "f")
    return ("-" if x < 0 and float(text) != 0 else "") + text


def interval(lo: float, hi: float) -> str:
    """A share known only between two bounds, as percent: "0", "0.12" or "0..0.12"."""
    low, high = percent(lo), percent(hi)
    return low if low == high else f"{low}..{high}"


def power_of_two(x: float | None) -> str:
    """2^k where x is a power of two, else `number`."""
    if x is None or not math.isfinite(x) or x <= 0:
        return number(x)
    mantissa, exponent = math.frexp(x)
    return f"2^{exponent - 1}" if mantissa == 0.5 else number(x)


def raised(text: str) -> str:
    """2^-14 within `text` as 2 with a raised -14, for pages; plain text keeps the caret."""
    return re.sub(r"(?<![\w.])2\^(-?\d+)\b", lambda m: "2" + m[1].translate(_RAISED), text)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def bytes_text(n: float | None) -> str:
    """Bytes in kB, MB or GB (powers of 1000)."""
    if n is None or n != n:
        return MISSING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}" if abs(n) < 999.5 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def count_text(n: float | None) -> str:
    """Counts of things: 950, 12.3k, 124M, 1.5G."""
    if n is None or n != n:
        return MISSING
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}" if abs(n) < 999.5 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


def shorten(text: str, width: int) -> str:
    """`text` within `width` characters, its middle replaced by one "…" where it is longer."""
    if len(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def plural(n: int, word: str) -> str:
    """ "1 module", "3 modules"."""
    return f"{n} {word}" if n == 1 else f"{n:,} {word}s"
