"""precscope: which layers can run in fp16, bf16 or fp8, which must not, why, and what it gains.

    record a real run -> ask any format -> recommend -> plan.json -> apply & train -> compare & report

Names are loaded when first used, so that `import precscope` stays light and reading a saved run needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "FloatFormat": "formats", "get_format": "formats",
    "Role": "sites", "Site": "sites",
    "TensorStats": "stats",
    "summarize": "kernels",
    "quantize": "rounding",
    "Profile": "profiles",
    "PrecisionPlan": "plans", "LayerPrecision": "plans", "Reason": "plans",
    "record": "recording", "Recorder": "recording",
    "apply": "applying",
    "Task": "tasks",
    "GuardConfig": "training.guard", "read_events": "events",
    "train": "training", "TrainConfig": "training", "TrainResult": "training",
    "profile": "profiling",
    "trace": "tracing", "trace_step": "replaying",
    "emulate": "emulation",
    "recommend": "confirmation",
    "tune": "tuning",
    "infer": "inference", "export": "exporting", "convert": "converting",
    "compare": "comparison", "verify": "comparison",
    "report": "reporting",
    "plot": "plotting",
    "PrecscopeError": "errors", "UsageError": "errors", "RunError": "errors",
}  # fmt: skip

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'precscope' has no attribute {name!r}; it has {', '.join(sorted(_WHERE))}")
    if name == "plot":  # the one name that is a module
        value = importlib.import_module(".plotting", __name__)
    else:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
