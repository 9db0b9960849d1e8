"""Who a statistic belongs to.

A site is (module, role, call, tensor): the module's fully qualified name ("" is the root), what the tensor is to that
module, the how-manieth call of the module within one forward pass, and, where a role holds several tensors (weight and
bias, a tuple output), which one. `Profile.ask` merges the tensors of one (module, role, call) unless told otherwise.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    """What a tensor is to its module. `grad_x` is the gradient of the loss with respect to x."""

    INPUT = "input"
    OUTPUT = "output"
    WEIGHT = "weight"
    GRAD_INPUT = "grad_input"
    GRAD_OUTPUT = "grad_output"
    GRAD_WEIGHT = "grad_weight"
    UPDATE = "update"
    STATE = "state"

    @property
    def is_gradient(self) -> bool:
        """Whether a loss scale multiplies tensors of this role."""
        return self.value.startswith("grad_")


class Site(NamedTuple):
    """Key of one row of statistics."""

    module: str
    role: Role
    call: int = 0
    tensor: str = ""

    def __str__(self) -> str:
        name = self.module or "(root)"
        call = f"#{self.call}" if self.call else ""
        tensor = f"[{self.tensor}]" if self.tensor else ""
        return f"{name}{call}.{self.role.value}{tensor}"
