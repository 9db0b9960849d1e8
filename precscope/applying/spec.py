"""What a planned module's forward does, kept on the module itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError

MARK = "_precscope_plan"
"""Attribute of a planned module: its Spec. Also set on its planned forward, to tell that from others."""


class Now:
    """Which region is running, of which kind ("" outside the model) and dtype, and its `attention`; one per applied
    plan."""

    def __init__(self) -> None:
        self.region = -1
        self.kind = ""
        self.dtype = torch.float32
        self.attention = False


@dataclasses.dataclass(eq=False)
class Spec:
    """What the planned forward of one module does.

    kind: "fp32", "autocast" or "cast". dtype: that of the compute. fp8: format of the operands of this matmul module,
    else None. native: device type whose own 8-bit products it takes, "" where they are emulated. tf32: how the CUDA
    switch must stand, None where it is left alone. region: a number. target: the dtype in which the forward sees the
    tensors of the modules in `swap`, which are stored in another. weight: whether what it returns is a parameter of
    the module around it (a parametrization). previous: the instance's own forward before, if it had one. stored:
    (table, name) -> the tensor before its storage was converted; stored_in: the dtype that it was converted to.
    """

    kind: str
    dtype: torch.dtype
    fp8: str | None
    native: str
    tf32: bool | None
    region: int
    now: Now
    target: torch.dtype
    swap: tuple[nn.Module, ...] = ()
    lookup: bool = False
    attention: bool = False
    weight: bool = False
    previous: Callable[..., Any] | None = None
    stored: dict[tuple[str, str], Tensor | torch.dtype] = dataclasses.field(default_factory=dict)
    stored_in: dict[tuple[str, str], torch.dtype] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spec:
        return Spec(**{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in dataclasses.fields(self)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PlanError(
            "a model with a plan on it cannot be pickled: save model.state_dict() and plan.save(), "
            "or remove the plan first"
        )
