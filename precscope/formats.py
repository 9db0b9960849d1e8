"""Number formats: a format is a small frozen record; everything else about it is derived.

A binary floating-point format is described by `precision` (explicit significand bits, p), the exponents of its
smallest and largest normal binade (`emin`, `emax`) and its largest finite value. Presets follow IEEE 754-2019
(fp16, fp32, fp64), the bfloat16 and TF32 definitions, OCP 8-bit Floating Point (OFP8) revision 1.0 (e4m3fn, e5m2),
Noune et al. arXiv:2206.02915 (the fnuz variants) and OCP Microscaling Formats (MX) 1.0 (e3m2, e2m3, e2m1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .errors import FormatError, nearest


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format of radix 2 with gradual underflow.

    name: short name. bits: storage width. precision: explicit significand bits p. emin, emax: exponents of the
    smallest and of the largest normal binade [2^e, 2^(e+1)). max: largest finite value. has_inf, has_nan: whether
    the format can encode them. signed_zero: whether -0 exists (fnuz formats have none).
    """

    name: str
    bits: int
    precision: int
    emin: int
    emax: int
    max: float
    has_inf: bool
    has_nan: bool = True
    signed_zero: bool = True

    @cached_property
    def eps(self) -> float:
        """Distance from 1 to the next larger value: 2^-p."""
        return 2.0**-self.precision

    @cached_property
    def smallest_normal(self) -> float:
        """2^emin."""
        return 2.0**self.emin

    @cached_property
    def smallest_subnormal(self) -> float:
        """2^(emin - p), the distance between neighbouring subnormals."""
        return 2.0 ** (self.emin - self.precision)

    @cached_property
    def flush_below(self) -> float:
        """Half of the smallest subnormal: magnitudes up to here round to zero (nearest even)."""
        return 2.0 ** (self.emin - self.precision - 1)

    @cached_property
    def overflow_from(self) -> float:
        """Midpoint between `max` and the value that would follow it, were the exponent range unbounded."""
        return self.max + 0.5 * 2.0 ** (self.emax - self.precision)

    @cached_property
    def overflow_at_midpoint(self) -> bool:
        """Whether a value exactly at `overflow_from` overflows under nearest-even (the significand of max is odd)."""
        return int(self.max / 2.0 ** (self.emax - self.precision)) % 2 == 1

    @cached_property
    def torch_dtype_name(self) -> str | None:
        """Name of the torch dtype that stores this format, or None (tf32, 6- and 4-bit formats have none)."""
        return _TORCH_DTYPES.get(self.name)

    def ulp_exponent(self, binade: int) -> int:
        """Exponent of the unit in the last place of values in `binade`: max(binade, emin) - p."""
        return max(binade, self.emin) - self.precision

    def overflows(self, magnitude: float) -> bool:
        """Whether a finite `magnitude` rounds beyond the largest finite value (nearest even)."""
        if self.overflow_at_midpoint:
            return magnitude >= self.overflow_from
        return magnitude > self.overflow_from

    def __str__(self) -> str:
        return self.name


_PRESETS = {
    f.name: f
    for f in (
        FloatFormat("fp64", 64, 52, -1022, 1023, 1.7976931348623157e308, has_inf=True),
        FloatFormat("fp32", 32, 23, -126, 127, 3.4028234663852886e38, has_inf=True),
        FloatFormat("tf32", 19, 10, -126, 127, 3.4011621342146535e38, has_inf=True),
        FloatFormat("fp16", 16, 10, -14, 15, 65504.0, has_inf=True),
        FloatFormat("bf16", 16, 7, -126, 127, 3.3895313892515355e38, has_inf=True),
        FloatFormat("e4m3", 8, 3, -6, 8, 448.0, has_inf=False),
        FloatFormat("e5m2", 8, 2, -14, 15, 57344.0, has_inf=True),
        FloatFormat("e4m3fnuz", 8, 3, -7, 7, 240.0, has_inf=False, signed_zero=False),
        FloatFormat("e5m2fnuz", 8, 2, -15, 15, 57344.0, has_inf=False, signed_zero=False),
        FloatFormat("e3m2", 6, 2, -2, 4, 28.0, has_inf=False, has_nan=False),
        FloatFormat("e2m3", 6, 3, 0, 2, 7.5, has_inf=False, has_nan=False),
        FloatFormat("e2m1", 4, 1, 0, 2, 6.0, has_inf=False, has_nan=False),
    )
}

_ALIASES = {
    "float64": "fp64", "double": "fp64",
    "float32": "fp32", "float": "fp32",
    "tensorfloat32": "tf32", "tfloat32": "tf32",
    "float16": "fp16", "half": "fp16",
    "bfloat16": "bf16",
    "e4m3fn": "e4m3", "float8_e4m3fn": "e4m3", "fp8_e4m3": "e4m3", "ofp8_e4m3": "e4m3",
    "float8_e5m2": "e5m2", "fp8_e5m2": "e5m2", "ofp8_e5m2": "e5m2",
    "float8_e4m3fnuz": "e4m3fnuz", "float8_e5m2fnuz": "e5m2fnuz",
    "e3m2fn": "e3m2", "float6_e3m2fn": "e3m2", "fp6_e3m2": "e3m2",
    "e2m3fn": "e2m3", "float6_e2m3fn": "e2m3", "fp6_e2m3": "e2m3",
    "e2m1fn": "e2m1", "float4_e2m1fn": "e2m1", "fp4_e2m1": "e2m1", "fp4": "e2m1",
}  # fmt: skip

_TORCH_DTYPES = {
    "fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
    "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e4m3fnuz": "float8_e4m3fnuz", "e5m2fnuz": "float8_e5m2fnuz",
}  # fmt: skip


def format_names() -> tuple[str, ...]:
    """Short names of all formats, widest first."""
    return tuple(_PRESETS)


def get_format(name: str | FloatFormat) -> FloatFormat:
    """The format called `name`: a short name ("fp16"), a long one ("float16", "float8_e4m3fn"), a torch dtype's
    text ("torch.bfloat16"), or a FloatFormat, which is returned as it is.

    Raises FormatError naming the nearest known names.
    """
    if isinstance(name, FloatFormat):
        return name
    key = str(name).strip().lower().removeprefix("torch.").replace("-", "_")
    key = _ALIASES.get(key, key)
    if key in _PRESETS:
        return _PRESETS[key]
    hint = nearest(key, [*_PRESETS, *_ALIASES])
    did_you_mean = f" (did you mean {hint}?)" if hint else ""
    raise FormatError(f"unknown format {name!r}{did_you_mean}; known formats: {', '.join(_PRESETS)}")
