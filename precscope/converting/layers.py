"""A plan spread over the modules of a model, as the engines want it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..plans import LayerPrecision, PrecisionPlan

if TYPE_CHECKING:
    from torch import nn

    from ..applying.layout import Layout


def layout_of(plan: PrecisionPlan, model: Any, target: str) -> Layout:
    """Who runs in what. Raises PlanError where no model is given, or where the plan does not fit it."""
    from ..applying.handle import unwrap
    from ..applying.layout import Layout

    if model is None:
        raise PlanError(
            f"{target} takes the names of modules: give the model that the plan is for (model=..., or --task TASK on "
            "the command line)"
        )
    return Layout(plan, unwrap(model))


def is_product(module: nn.Module) -> bool:
    """Whether a module multiplies matrices: linear and convolution modules, and those of TransformerEngine."""
    from ..applying.dtypes import is_matmul

    return is_matmul(module) or type(module).__module__.startswith("transformer_engine.")


def is_fp8(layer: LayerPrecision) -> bool:
    """Whether it computes in an 8-bit format."""
    return layer.compute in ("e4m3", "e5m2")


def executed(layer: LayerPrecision, module: nn.Module) -> LayerPrecision:
    """What `module` computes in: 8-bit formats are for products, all else in a region of theirs is bf16."""
    if not is_fp8(layer) or is_product(module):
        return layer
    return LayerPrecision("bf16", policy=layer.policy, params=layer.params, reasons=layer.reasons)


def some(names: Iterable[str], most: int = 4) -> str:
    """The first names and how many more: "a, b and 3 more"."""
    names = [name or "the model itself" for name in names]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def roots(names: Collection[str], others: Collection[str]) -> list[str]:
    """The highest names whose subtrees hold no name of `others`, such that together they hold all of `names`.

    names, others: disjoint. "a.x", "a.y" beside "b" -> ["a"]."""
    barred = {above for name in others for above in ancestors(name)}
    found = {next(a for a in ancestors(name) if a == name or a not in barred) for name in names}
    return sorted(n for n in found if not any(a in found for a in ancestors(n) if a != n))


def ancestors(name: str) -> list[str]:
    """The root "" first, the name itself last."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
