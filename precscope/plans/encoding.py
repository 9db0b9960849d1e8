"""Values as JSON has them, and inf and NaN, which JSON lacks as numbers, as text.

Every NaN becomes the one object `math.nan`: containers compare their items by identity first, so a plan with a NaN in
its evidence equals what is read back from its file.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ..errors import PlanError

_NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: numpy scalars become numbers, tuples lists, text subclasses str."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return math.nan if math.isnan(value) else float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a numpy scalar
        return plain(value.item())
    raise ValueError(f"{type(value).__name__} values cannot be written as JSON; give numbers, text, lists or dicts")


def encode(value: Any) -> Any:
    """`value` with inf and NaN as the strings "Infinity", "-Infinity" and "NaN"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return [encode(v) for v in value] if isinstance(value, (list, tuple)) else value


def decode(value: Any) -> Any:
    """Undo `encode`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {k: decode(v) for k, v in value.items()}
    return [decode(v) for v in value] if isinstance(value, list) else value


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself keeps the last of two equal keys and says nothing."""
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, n in counts.items() if n > 1]
    if twice:
        raise PlanError(f"{twice[0]!r} is there twice in one object; keep one of the two")
    return dict(pairs)
