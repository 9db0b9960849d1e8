"""A plan as the filter of torchao's float8 training (tested with torchao 0.18).

    from torchao.float8 import convert_to_float8_training
    convert_to_float8_training(model, module_filter_fn=ps.convert(plan, "torchao", model=model).value)

True for the nn.Linear modules that the plan computes in e4m3 and whose sizes are multiples of 16, which the matrix
products of devices ask for. torchao multiplies e4m3 by e4m3 forward and takes gradients in e5m2, as ps.apply does; its
scales are amax to the end of the format, those of ps.apply powers of two with one binade to spare.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plans import LayerPrecision, PrecisionPlan
from .layers import is_fp8, is_product, layout_of, some
from .result import Converted

if TYPE_CHECKING:
    from torch import nn

MULTIPLE = 16
_FILE = '''"""Which linear modules train in float8, for torchao.float8.convert_to_float8_training.

    from torchao.float8 import convert_to_float8_training
    convert_to_float8_training(model, module_filter_fn=module_filter_fn)

Written by precscope from a precision plan.{notes}
"""

from torch import nn

NAMES = frozenset(
    [
{names}
    ]
)


def module_filter_fn(module: nn.Module, fqn: str) -> bool:
    """Whether the plan computes this module in e4m3."""
    return isinstance(module, nn.Linear) and fqn in NAMES
'''


def to_torchao(plan: PrecisionPlan, model: Any) -> Converted:
    """See the module. Raises PlanError without a model, and where no linear module of it is planned in e4m3."""
    from torch import nn

    layout = layout_of(plan, model, "torchao")
    chosen: list[str] = []
    odd, other, high = list[str](), list[str](), list[str]()
    for module, names in layout.names.items():
        layer = layout.precision[module]
        if not is_product(module):
            continue
        if layer.compute == "e4m3" and isinstance(module, nn.Linear):
            fits = not any(n % MULTIPLE for n in module.weight.shape)
            (chosen if fits else odd).extend(names)
        elif is_fp8(layer):
            other.append(f"{names[0]} ({layer.compute}, {type(module).__name__})")
        elif _is_wide(layer):
            high.append(names[0])
    if not chosen:
        raise PlanError(
            "the plan computes no linear module of this model in e4m3 with sizes that are multiples of 16: there is "
            "nothing for torchao to convert; precscope recommend RUN --formats e4m3,bf16,fp32 makes plans with fp8"
        )
    lost = []
    if odd:
        lost.append(f"{some(odd)}: e4m3 in the plan, but not a multiple of 16 in size, so left as they are")
    if other:
        lost.append(f"{some(other)}: torchao has float8 training for linear modules in e4m3 alone, so left as they are")
    if high:
        lost.append(f"{some(high)}: fp32 in the plan; torchao leaves them as they are, and autocast would lower them")
    notes = "".join("\n" + textwrap.fill(f"Not expressed: {text}.", 118) for text in lost)
    listed = "\n".join(f"        {json.dumps(name)}," for name in chosen)
    return Converted("torchao", _filter(frozenset(chosen)), _FILE.format(names=listed, notes=notes), tuple(lost))


def _is_wide(layer: LayerPrecision) -> bool:
    return layer.compute in ("fp32", "tf32")


def _filter(names: frozenset[str]) -> Callable[[nn.Module, str], bool]:
    def module_filter_fn(module: nn.Module, fqn: str) -> bool:
        """Whether the plan computes this module in e4m3."""
        from torch import nn

        return isinstance(module, nn.Linear) and fqn in names

    return module_filter_fn
