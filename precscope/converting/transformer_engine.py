"""A plan as a configuration of nvdlfw-inspect for TransformerEngine: which layers stay out of fp8.

    import nvdlfw_inspect.api as debug_api
    debug_api.initialize("fp8.yaml", feature_dirs=[".../transformer_engine/debug/features"])
    debug_api.infer_and_assign_layer_names(model)       # "model." and the module's name; or name=... of each TE layer

Training itself runs under TransformerEngine's fp8 autocast, whose hybrid recipe (e4m3 forward, e5m2 for gradients) is
what e4m3 means in a plan; the file turns fp8 off where the plan computes in something else. It has one section, because
a layer may be in one only, and names layers by a regex, because nvdlfw-inspect 0.2.2 raises ValueError for every layer
that a list of exact names lacks. The feature is called DisableFP8Layer, which newer versions of
TransformerEngine keep as another name of DisableQuantizationLayer.

Tested with the configuration parser of nvdlfw-inspect 0.2.2; TransformerEngine itself needs a GPU and was not run.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from ..errors import PlanError
from ..plans import PrecisionPlan
from ..plans.lookup import is_pattern
from .layers import ancestors, is_fp8, is_product, layout_of, roots, some
from .result import Converted

SECTION = "kept_out_of_fp8"
_NUMBERED = re.compile(r"((?:[^.\d]*\\\.)*?)(\d+)((?:\\\.|\(|$).*)")
_HEAD = """\
# Layers that TransformerEngine keeps out of fp8, by nvdlfw-inspect. Written by precscope from a precision plan.
#
#   import nvdlfw_inspect.api as debug_api
#   debug_api.initialize(THIS_FILE, feature_dirs=[FOLDER_OF_TRANSFORMER_ENGINE + "/debug/features"])
#   debug_api.infer_and_assign_layer_names(model)
#
"""


def to_transformer_engine(plan: PrecisionPlan, model: Any) -> Converted:
    """See the module. `value` is the configuration as a dict, which debug_api.initialize takes, too.

    Raises PlanError where nothing or everything is fp8, and for a plan with patterns where no model is given."""
    high, low, lost = _by_keys(plan) if model is None else _by_modules(plan, model)
    if not low:
        raise PlanError(
            "the plan computes no layer in e4m3: there is nothing for TransformerEngine to do in fp8; "
            "precscope recommend RUN --formats e4m3,bf16,fp32 makes plans with fp8"
        )
    if not high:
        raise PlanError("the plan computes every layer in e4m3: TransformerEngine's fp8 autocast alone does that")
    pattern = _pattern(high, low)
    config = {
        SECTION: {
            "enabled": True,
            "layers": {"layer_name_regex_pattern": pattern},
            "transformer_engine": {"DisableFP8Layer": {"enabled": True}},
        }
    }
    quoted = pattern.replace("'", "''")
    said = [*(f"Not expressed: {sentence}." for sentence in lost), *_why(plan, high)]
    text = _HEAD + "".join(
        textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ") + "\n" for line in said
    )
    text += (
        f"{SECTION}:\n  enabled: True\n  layers:\n    layer_name_regex_pattern: '{quoted}'\n"
        "  transformer_engine:\n    DisableFP8Layer:\n      enabled: True\n"
    )
    return Converted("transformer-engine", config, text, tuple(lost))


def _by_modules(plan: PrecisionPlan, model: Any) -> tuple[list[str], list[str], list[str]]:
    """(names high up whose layers are all kept out of fp8, names of layers in fp8, what is lost)."""
    layout = layout_of(plan, model, "transformer-engine")
    low, kept, wide, five = list[str](), list[str](), list[str](), list[str]()
    for module, names in layout.names.items():
        if not is_product(module):
            continue
        compute = layout.precision[module].compute
        (low if compute == "e4m3" else kept).extend(names)
        five += names[:1] if compute == "e5m2" else []
        wide += names[:1] if compute in ("fp32", "tf32") else []
    return roots(kept, low), low, _lost(wide, five)


def _by_keys(plan: PrecisionPlan) -> tuple[list[str], list[str], list[str]]:
    """The same from the plan's own entries."""
    patterns = [key for key in plan.modules if is_pattern(key)]
    if patterns:
        raise PlanError(
            f"the plan has patterns ({some(patterns)}), and which layers they mean is for the model to say: give it "
            "(model=..., or --task TASK on the command line)"
        )
    layers = {"": plan.default, **plan.modules}
    low = [key for key, layer in layers.items() if layer.compute == "e4m3"]
    wide = [key for key, layer in layers.items() if layer.compute in ("fp32", "tf32")]
    five = [key for key, layer in layers.items() if is_fp8(layer) and layer.compute == "e5m2"]
    return [key for key in layers if key not in low], low, _lost(wide, five)


def _lost(wide: list[str], five: list[str]) -> list[str]:
    lost = []
    if wide:
        lost.append(
            f"{some(wide)}: fp32 in the plan; out of fp8, they run in the dtype that the model has around it, bf16 "
            "under autocast"
        )
    if five:
        lost.append(f"{some(five)}: e5m2 in the plan; TransformerEngine multiplies in e4m3 forward, so out of fp8")
    return lost


def _pattern(high: list[str], low: list[str]) -> str:
    """A regex that `search` finds in a layer's name where the deciding entry is one of `high`: the layer itself, what
    is below it, but not what is at or below a nearer entry of `low`; with "model." in front or not."""
    found = []
    for key in [k for k in high if k]:
        tails = [name[len(key) + 1 :] for name in low if key in ancestors(name)[1:-1]]
        found.append(_escaped(key) + (rf"(?!\.(?:{_any(tails)})(?:\.|$))" if tails else "") + r"(?:\.|$)")
    named = rf"^(?:model\.)?(?:{'|'.join(_joined(found))})" if found else ""
    if "" not in high:
        return named
    rest = rf"^(?!(?:model\.)?(?:{_any(low)})(?:\.|$))"
    return f"{named}|{rest}" if named else rest


def _any(names: list[str]) -> str:
    return "|".join(_joined([_escaped(name) for name in names]))


def _escaped(name: str) -> str:
    """re.escape, which also escapes what needs none, such as "-"."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name)


def _joined(patterns: list[str]) -> list[str]:
    """Patterns that differ in their first number alone as one: layers\\.(?:0|3)\\.fc1."""
    groups: dict[tuple[str, str], list[str]] = {}
    for pattern in patterns:
        found = _NUMBERED.fullmatch(pattern)
        head, number, tail = found.groups() if found else (pattern, "", "")
        groups.setdefault((head, tail), []).append(number)
    return [
        head + (numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})") + tail
        for (head, tail), numbers in groups.items()
    ]


def _why(plan: PrecisionPlan, high: list[str]) -> list[str]:
    """A line of reason for each entry that has one."""
    said = []
    for key in high:
        layer = plan[key]
        if layer.reasons:
            said.append(f"{key or '(default)'}: {layer.compute}: {' '.join(str(layer.reasons[0]).split())}")
    return said
