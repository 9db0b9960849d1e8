"""The precision plan: which format each module of a model runs in, and why. Needs no torch.

    {"schema": 1,
     "default": {"compute": "bf16"},
     "modules": {"blocks.*.attn": {"compute": "fp32", "reasons": ["attention logits reach 1.1e5"]}, "head": "fp32"}}

A plan is a value: `replace` makes another one. `plan[name]` answers for every module name: the entry of exactly this
name, else the one pattern (`*`, `?`, `[...]`, as in file names; `*` crosses dots) that matches it, else what the
nearest parent has, else `default`. Two matching patterns are an error, never a silent choice.

In the file, inf and NaN are written as the strings "Infinity", "-Infinity" and "NaN", which JSON lacks as numbers.
"""

from __future__ import annotations

from .differences import Difference, PlanDiff
from .edges import Cast, casts
from .files import SCHEMA
from .layers import STORED, LayerPrecision, Reason
from .model import LossScale, Phase, PrecisionPlan

__all__ = [
    "SCHEMA", "STORED", "Cast", "Difference", "LayerPrecision", "LossScale", "Phase", "PlanDiff", "PrecisionPlan",
    "Reason", "casts",
]  # fmt: skip
