"""The scalar twin of `precscope.quantize`: slow, readable, exact.

Rounding to a format with scale 2^k means: multiply by 2^k, round to a value of the format, multiply by 2^-k. All of it
happens here in rational numbers, so that no step but the rounding itself can lose anything. The tensor version in
`rounding` must agree with this one bit for bit; both must agree with independent implementations.

The rules, for every format:

- NaN stays NaN, also for formats that cannot encode it (e3m2, e2m3, e2m1): the container keeps it.
- Overflow, `saturate=False`: a magnitude that rounds beyond the largest finite value becomes inf where the format has
  inf, NaN where it has only NaN (e4m3, e4m3fnuz, e5m2fnuz), the largest finite value where it has neither. So does inf.
- Overflow, `saturate=True`: the largest finite value, also for inf.
- "toward_zero" never overflows from a finite value (IEEE 754-2019, section 7.4): it gives the largest finite value.
- "stochastic" goes to the neighbour away from zero with a probability equal to the distance already covered, in the
  subnormal range too. Above the largest finite value the upper neighbour is the value that would follow, were the
  exponent range unbounded; reaching it is overflow: e4m3 turns 464 (midway from 448 to 480) into NaN half of the time.
- A negative value that rounds to zero gives -0, or +0 where the format has no -0 (fnuz).
"""

from __future__ import annotations

import math
import operator
import random as random_module
from fractions import Fraction
from typing import Protocol

from .errors import UsageError
from .formats import FloatFormat, get_format

ROUNDINGS = ("nearest_even", "stochastic", "toward_zero")
MAX_SCALE_EXPONENT = 512


class UniformSource(Protocol):
    """Anything that draws uniform numbers from [0, 1), such as `random.Random(seed)`."""

    def random(self) -> float: ...


def check_rounding(rounding: str) -> str:
    """`rounding` itself, or UsageError naming the three that exist."""
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding was {rounding!r}; it must be one of {', '.join(map(repr, ROUNDINGS))}")
    return rounding


def check_scale_exponent(scale_exponent: int) -> int:
    """`scale_exponent` as int, or UsageError: it is the k of a scale 2^k, an integer between -512 and 512."""
    try:
        exponent = operator.index(scale_exponent)
    except TypeError:
        exponent = MAX_SCALE_EXPONENT + 1
    if abs(exponent) > MAX_SCALE_EXPONENT:
        raise UsageError(
            f"scale_exponent was {scale_exponent!r}; it is the k of a scale 2^k and must be an integer "
            f"between -{MAX_SCALE_EXPONENT} and {MAX_SCALE_EXPONENT}"
        )
    return exponent


def quantize_scalar(
    x: float,
    fmt: str | FloatFormat,
    *,
    rounding: str = "nearest_even",
    saturate: bool = False,
    scale_exponent: int = 0,
    random: UniformSource | None = None,
) -> float:
    """What `x` becomes when it is stored in `fmt` with scale 2^`scale_exponent`, as a Python float (binary64).

    rounding: "nearest_even", "stochastic" or "toward_zero". saturate: overflow gives the largest finite value.
    random: where "stochastic" draws from, one number per finite non-zero x; Python's shared generator if not given.
    A result beyond the range of binary64 (possible only through the scale) is returned as inf.

    Raises FormatError for an unknown format, UsageError for an unknown rounding or scale.
    """
    fmt = get_format(fmt)
    check_rounding(rounding)
    scale_exponent = check_scale_exponent(scale_exponent)
    if math.isnan(x):
        return x
    if math.isinf(x):
        magnitude = _overflow(fmt, saturate)
    elif x == 0:
        magnitude = Fraction(0)
    else:
        scaled = Fraction(abs(x)) * Fraction(2) ** scale_exponent
        magnitude = _round_magnitude(scaled, fmt, rounding, random or random_module)
        if magnitude > fmt.max:
            magnitude = Fraction(fmt.max) if rounding == "toward_zero" else _overflow(fmt, saturate)
    if not fmt.signed_zero and magnitude == 0:
        return 0.0
    return math.copysign(_unscale(magnitude, scale_exponent), x)


def _round_magnitude(magnitude: Fraction, fmt: FloatFormat, rounding: str, random: UniformSource) -> Fraction:
    """The positive `magnitude` rounded to a multiple of its ulp; the exponent range is unbounded above."""
    ulp = Fraction(2) ** fmt.ulp_exponent(_binade(magnitude))
    below, rest = divmod(magnitude / ulp, 1)  # below: how many ulps fit; rest: the distance covered, in [0, 1)
    if rounding == "toward_zero":
        away = False
    elif rounding == "stochastic":
        away = random.random() < rest
    else:
        away = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1)
    return (below + away) * ulp


def _binade(magnitude: Fraction) -> int:
    """The e with 2^e <= magnitude < 2^(e+1)."""
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return e if Fraction(2) ** e <= magnitude else e - 1


def _overflow(fmt: FloatFormat, saturate: bool) -> Fraction | float:
    """What a magnitude beyond the largest finite value becomes."""
    if not saturate and fmt.has_inf:
        return math.inf
    if not saturate and fmt.has_nan:
        return math.nan
    return Fraction(fmt.max)


def _unscale(magnitude: Fraction | float, scale_exponent: int) -> float:
    """magnitude 2^-k; inf and NaN pass, and so does inf for a result beyond binary64."""
    if not isinstance(magnitude, Fraction):
        return magnitude
    try:
        return float(magnitude / Fraction(2) ** scale_exponent)
    except OverflowError:
        return math.inf
