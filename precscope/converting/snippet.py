"""A plan as a Python file of plain PyTorch code, which needs no precscope.

    ps.convert(plan, "snippet", model=model, out="planned.py")

    from planned import apply_plan, loss_context
    apply_plan(model)                                   # before the optimizer, torch.compile and DDP
    with loss_context(): loss = loss_of(model, batch)   # planned.Scaler("cuda") where the plan computes in fp16

Outputs and gradients are those of ps.apply, bit for bit: autocast per module, inputs cast, fp32 islands, parameters
stored as planned. Refused: fp8, whose arithmetic ps.apply emulates where the device lacks it and which is torchao's or
TransformerEngine's elsewhere. Left out, with a comment in capitals: how the optimizer writes low parameters (stochastic
rounding, Kahan, fp32 masters), because that is the optimizer's; and TF32, which is a switch of the whole process, so
that tf32 becomes fp32. Removing the plan again is left out, too.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import PlanError
from ..plans import PrecisionPlan
from .layers import executed, is_fp8, is_product, layout_of, some
from .result import Converted

if TYPE_CHECKING:
    from torch import nn

    from ..applying.layout import Layout

_BLOCK = r"^[ ]*# \[{word}\]\n(.*?)^[ ]*# \[/{word}\]\n"


def to_snippet(plan: PrecisionPlan, model: Any) -> Converted:
    """See the module. `value` is the code. Raises PlanError without a model, and for plans with fp8."""
    layout = layout_of(plan, model, "snippet")
    eight = [layout.names[m][0] for m, layer in layout.precision.items() if is_fp8(layer) and is_product(m)]
    if eight:
        raise PlanError(
            f"{some(eight)}: {layout.plan[eight[0]].compute} in the plan, and plain PyTorch has no modules that train "
            "in fp8: convert to torchao or transformer-engine, or make a plan of fp16, bf16 and fp32"
        )
    names = {module: name for name, module in layout.root.named_modules()}
    wrapped = [name for name in names.values() if re.search(r"_checkpoint_wrapped_module|_fsdp_wrapped_module", name)]
    if wrapped:
        raise PlanError(f"{wrapped[0]}: a wrapper lies around this module; convert with the model as it was built")
    lost = _lost(plan, layout, names)
    words = _needed(layout)
    code = _without_blocks(_template(), words).replace("# <plan>\n", _entries(plan, layout, names), 1)
    text = _head(plan, layout, lost) + "\n" + _imports(words) + code
    return Converted("snippet", text, text, tuple(lost))


def _needed(layout: Layout) -> set[str]:
    """The parts of the template that the plan has work for."""
    import torch

    from ..applying.dtypes import CONVERTED, kind_of

    layers = list(layout.precision.values())
    tensors = [t for m in layout.names for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    odd = any(t.dtype in (*CONVERTED, torch.float64) and t.dtype is not torch.float32 for t in tensors)
    words = set()
    if odd or any(layer.params != "fp32" or kind_of(layer) == "cast" for layer in layers):
        words.add("storage")
    if any(layer.precision == ("bf16", "cast", "fp32") for layer in layers):
        words.add("attention")
    if any(layer.compute == "fp16" for layer in layers):
        words.add("scaler")
        words |= {"half"} if any(layer.params == "fp16" for layer in layers) else set()
    return words


def _template() -> str:
    """The code of plain.py, with the functions of ps.apply's own attention in it."""
    from ..applying import attention

    text = (Path(__file__).parent / "plain.py").read_text(encoding="utf-8").partition("# [code]\n")[2]
    functions = (attention._suits, attention.attend, attention._weights, attention._causal, attention._bias)
    source = "\n\n".join(inspect.getsource(f) for f in functions)
    text = re.sub(_BLOCK.format(word="attention functions"), lambda _: source, text, flags=re.S | re.M)
    return re.sub(_BLOCK.format(word="plan"), "# <plan>\n", text, flags=re.S | re.M)


def _without_blocks(text: str, needed: set[str]) -> str:
    """The blocks of other words left out, and all marks."""
    for word in ("half", "scaler", "storage", "attention"):
        text = re.sub(_BLOCK.format(word=word), r"\1" if word in needed else "", text, flags=re.S | re.M)
    text = re.sub(r"\n{3,}(?= )", "\n\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip("\n") + "\n"


def _imports(words: set[str]) -> str:
    """What the code imports."""
    standard = [
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "inspect",
        *(["math"] if "attention" in words else []),
    ]
    text = "from __future__ import annotations\n\n" + "".join(f"import {name}\n" for name in standard)
    text += "from collections import UserDict\nfrom typing import Any\n\nimport torch\n"
    text += "import torch.nn.functional as F\n" if "attention" in words else ""
    text += "from torch import Tensor, nn\n"
    return text + ("from torch.overrides import TorchFunctionMode\n" if "attention" in words else "")


def _entries(plan: PrecisionPlan, layout: Layout, names: dict[nn.Module, str]) -> str:
    """DEFAULT, PLAN, LOOKUPS and LOSS_SCALE as code: entries where a module differs from what it inherits."""
    default = _way(executed(plan.default, layout.root))
    held: dict[str, tuple[str, str, str]] = {}
    lines = []
    for module, name in names.items():
        layer = executed(layout.precision[module], module)
        above = held.get(name.rpartition(".")[0], default) if name else default
        held[name] = _way(layer)
        if held[name] != above:
            why = f"  # {_comment(layer.reasons[0])}" if layer.reasons else ""
            lines.append(f"    {json.dumps(name)}: {_quoted(held[name])},{why}\n")
    lookups = sorted(names[m] for m in layout.lookups)
    text = "\n# module: (compute, policy, stored); what has no entry follows its nearest parent, else DEFAULT\n"
    text += f"DEFAULT = {_quoted(default)}\n"
    text += "PLAN: dict[str, tuple[str, str, str]] = {" + ("\n" + "".join(lines) if lines else "") + "}\n"
    text += f"LOOKUPS = frozenset({json.dumps(lookups)})  # embeddings whose rows are cast, not their tables\n"
    if any(layer.compute == "fp16" for layer in layout.precision.values()):
        scale = plan.loss_scale
        numbers = {
            "initial": float(scale.get("initial", 2.0**16)),
            "growth_interval": int(scale.get("growth_interval", 2000)),
            "floor": float(scale.get("floor", 1.0)),
        }
        text += f"LOSS_SCALE = {json.dumps(numbers)}\n"
    return text


def _way(layer: Any) -> tuple[str, str, str]:
    compute, policy, params = layer.precision
    return ("fp32" if compute == "tf32" else compute), policy, params


def _quoted(way: tuple[str, str, str]) -> str:
    return "(" + ", ".join(f'"{word}"' for word in way) + ")"


def _comment(reason: Any) -> str:
    """The first reason in one line; quotes as they are used in the file."""
    return textwrap.shorten(" ".join(str(reason).split()), 100, placeholder=" ...")


def _lost(plan: PrecisionPlan, layout: Layout, names: dict[nn.Module, str]) -> list[str]:
    lost = []
    tf32 = [names[m] for m, layer in layout.precision.items() if layer.compute == "tf32" and m in layout.planned]
    if tf32:
        lost.append(
            f"{some(tf32)}: tf32 in the plan, a switch of the whole process (torch.backends.cuda.matmul.fp32_precision "
            '= "tf32"); fp32 here'
        )
    updates, state = plan.optimizer.get("updates"), plan.optimizer.get("state")
    if updates not in (None, "nearest"):
        lost.append(f"the optimizer is to write low parameters by {updates!r} updates, which this file does not do")
    if state not in (None, "fp32"):
        lost.append(f"the optimizer is to keep its state in {state}, which this file does not do")
    return lost


def _head(plan: PrecisionPlan, layout: Layout, lost: list[str]) -> str:
    model = type(layout.root).__name__
    scaler = any(layer.compute == "fp16" for layer in layout.precision.values())
    use = "    from planned import apply_plan, loss_context" + (", Scaler" if scaler else "") + "\n\n"
    use += "    apply_plan(model)          # before the optimizer is made, before torch.compile and DDP\n"
    use += "    with loss_context(device_type):\n        loss = loss_of(model, batch)\n"
    use += '    # scaler = Scaler("cuda"), used as any GradScaler\n' if scaler else ""
    counts = plan.counts(name for names in layout.names.values() for name in names[:1])
    told = ", ".join(f"{n} in {compute}" for compute, n in counts.most_common())
    head = (
        f'"""Runs a {model} as a precision plan says ({told} modules), in plain PyTorch.\n\n{use}\n'
        f'Written by precscope {__version__}, which it does not need. Plan: {plan.status}.\n"""\n'
    )
    for text in lost:
        head += textwrap.fill(f"NOT IN THIS FILE: {text}.", 116, initial_indent="# ", subsequent_indent="# ") + "\n"
    return head
