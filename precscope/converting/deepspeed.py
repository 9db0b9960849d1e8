"""A plan as settings for a DeepSpeed configuration (tested with DeepSpeed 0.19.8).

    settings = ps.convert(plan, "deepspeed", model=model).value
    deepspeed.initialize(model=model, config={**my_config, **settings}, ...)

DeepSpeed knows one low format for the whole model. Which section says so depends on the plan's policy:

    policy "cast"       "fp16" or "bf16": the model's parameters are converted, fp32 masters live in the optimizer
    policy "autocast"   "torch_autocast": parameters stay fp32, PyTorch's lists decide

What the plan keeps in fp32 neither can say, so it is in `lost`, and in the file under "_precscope", which DeepSpeed
leaves alone. With "torch_autocast" such modules can still have it: apply the plan (ps.apply, or the snippet) to the
model before deepspeed.initialize; its fp32 modules switch DeepSpeed's autocast off around themselves.

The loss scale is dynamic: initial_scale_power from the plan's initial scale, min_loss_scale from its floor,
loss_scale_window from growth_interval; hysteresis 1, since a plan's scale halves at the first overflow (DeepSpeed's
own default of 2 lets one pass). ZeRO takes these under "torch_autocast", too; without ZeRO, DeepSpeed makes a default
GradScaler there, which they do not reach.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from ..plans import LayerPrecision, PrecisionPlan
from .layers import executed, is_fp8, layout_of, some
from .result import Converted

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def to_deepspeed(plan: PrecisionPlan, model: Any) -> Converted:
    """See the module. Without a model the plan's entries and its default are looked at."""
    layers = _by_modules(plan, model) if model is not None else {"(default)": plan.default, **plan.modules}
    low = {name: "bf16" if is_fp8(layer) else layer.compute for name, layer in layers.items()}
    low = {name: compute for name, compute in low.items() if compute in _DTYPES}
    if not low:
        return _result({}, [], "the plan is fp32 throughout: DeepSpeed's default")
    counts = Counter(low.values())
    chosen = "bf16" if "bf16" in counts else "fp16"
    casts = Counter(layers[name].policy for name in low)
    section = "torch_autocast" if casts["autocast"] >= casts["cast"] else chosen
    lost = _lost(layers, low, chosen, section)
    settings: dict[str, Any] = {}
    if section == "torch_autocast":
        settings["torch_autocast"] = {"enabled": True, "dtype": _DTYPES[chosen]}
    else:
        settings[section] = {"enabled": True}
    if chosen == "fp16":
        scale, more = _loss_scale(plan)
        settings["fp16"] = {**settings.get("fp16", {"enabled": False}), **scale}
        if section == "torch_autocast":
            more.append("the loss scale's settings reach DeepSpeed's torch_autocast with ZeRO only")
        lost += more
    return _result(settings, lost, f"{chosen} for the whole model")


def _by_modules(plan: PrecisionPlan, model: Any) -> dict[str, LayerPrecision]:
    """Of modules that hold parameters themselves, or compute without any."""
    layout = layout_of(plan, model, "deepspeed")
    return {
        names[0] or "(root)": executed(layout.precision[module], module)
        for module, names in layout.names.items()
        if module._parameters or (module in layout.planned and not module._modules)
    }


def _lost(layers: dict[str, LayerPrecision], low: dict[str, str], chosen: str, section: str) -> list[str]:
    """What the plan says and one low format for the whole model does not."""
    lost = []
    high = [name for name in layers if name not in low]
    if high and section == "torch_autocast":
        lost.append(
            f"{some(high)}: fp32 in the plan; under torch_autocast PyTorch's lists decide, unless the plan is applied "
            "to the model (ps.apply, or the snippet) before deepspeed.initialize"
        )
    elif high:
        lost.append(f"{some(high)}: fp32 in the plan; the section {section!r} converts the whole model")
    other = [name for name, compute in low.items() if compute != chosen]
    if other:
        lost.append(f"{some(other)}: {low[other[0]]} in the plan; DeepSpeed has one low format, {chosen} for its range")
    eight = [name for name in low if is_fp8(layers[name])]
    if eight:
        lost.append(f"{some(eight)}: {layers[eight[0]].compute} in the plan; fp8 is not DeepSpeed's: {chosen}")
    policy = "autocast" if section == "torch_autocast" else "cast"
    unlike = [name for name in low if layers[name].policy != policy]
    if unlike:
        lost.append(f"{some(unlike)}: policy {layers[unlike[0]].policy!r} in the plan; here all is {policy!r}")
    stored = [name for name, layer in layers.items() if policy == "autocast" and layer.params != "fp32"]
    if stored:
        lost.append(f"{some(stored)}: stored in {layers[stored[0]].params} in the plan; stored as the model has them")
    return lost


def _loss_scale(plan: PrecisionPlan) -> tuple[dict[str, Any], list[str]]:
    """The fields of DeepSpeed's "fp16" section, and what they cannot hold."""
    scale, lost = plan.loss_scale, list[str]()
    initial = scale.get("initial", 2.0**16)
    power = math.floor(math.log2(initial)) if initial >= 1 else 0
    if 2.0**power != initial:
        lost.append(f"an initial loss scale of {initial:g}: DeepSpeed begins at powers of two, here 2^{power}")
    floor = scale.get("floor", 1.0)
    least = max(1, math.ceil(floor)) if floor > 0 else 1
    if least != floor:
        lost.append(
            f"a floor of {floor:g} of the loss scale: DeepSpeed takes whole numbers of at least 1, here {least}"
        )
    return {
        "loss_scale": 0,
        "initial_scale_power": power,
        "loss_scale_window": scale.get("growth_interval", 2000),
        "hysteresis": 1,
        "min_loss_scale": least,
    }, lost


def _result(settings: dict[str, Any], lost: list[str], summary: str) -> Converted:
    notes = {"_precscope": {"plan": summary, "not_expressed": lost}}
    return Converted("deepspeed", settings, json.dumps({**settings, **notes}, indent=2) + "\n", tuple(lost))
