"""A plan for other engines, and plans from what others write.

    ps.convert(plan, "torchao", model=model).value              # module_filter_fn of convert_to_float8_training
    ps.convert(plan, "transformer-engine", model=model, out="fp8.yaml")     # for nvdlfw-inspect
    ps.convert(plan, "deepspeed", out="ds.json")                # fp16, bf16 or torch_autocast, and the loss scale
    ps.convert(plan, "keras", model=model).value                # a keras.dtype_policies.DTypePolicyMap
    ps.convert(plan, "snippet", model=model, out="planned.py")  # plain PyTorch code that needs no precscope
    from_regexes([(r"attn$", "bf16"), (r"lm_head", "fp32")], model=model)   # -> PrecisionPlan
    from_keras(policy_map)                                                  # -> PrecisionPlan

Engines know less than a plan says. What one cannot express is in `Converted.lost`, in the written file, and in a
warning; it is never dropped silently. Without a model a plan is translated by its own entries; where it has patterns,
or where the target lists modules, the model is needed.

Tested with torchao 0.18, nvdlfw-inspect 0.2.2, DeepSpeed 0.19.8, torch 2.13.
"""

from __future__ import annotations

from .entry import TARGETS, convert, converted, from_keras
from .regexes import from_regexes
from .result import Converted

__all__ = ["TARGETS", "Converted", "convert", "converted", "from_keras", "from_regexes"]
