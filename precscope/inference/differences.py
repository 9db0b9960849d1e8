"""Outputs of two runs compared, over all batches: relative error, SQNR, largest difference, non-finite values.

    relative L2    sqrt(sum (y - r)^2 / sum r^2)           r: the reference's values, y: the plan's
    SQNR           10 log10(sum r^2 / sum (y - r)^2) dB

Sums are taken in fp64 over the elements that are finite in both; NaN where there is none. An element that is the same
inf in both, or NaN in both (a mask, say), is no difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskError
from .result import OutputDifference


def named_tensors(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors in a model's output by name: "output", "logits", "0", "hidden_states.3". Looks into tuples, lists,
    dicts, namedtuples and dataclasses; anything else (a cache, say) is passed over."""
    if isinstance(output, Tensor):
        return {name: output}
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = zip(output._fields, output, strict=True)
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = ((f.name, getattr(output, f.name)) for f in dataclasses.fields(output))
    found: dict[str, Tensor] = {}
    for key, item in items:
        found.update(named_tensors(item, str(key) if name == "output" else f"{name}.{key}"))
    return found


def floating(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of floating dtype, dense."""
    return {name: t for name, t in tensors.items() if t.is_floating_point() and t.layout is torch.strided}


class Differences:
    """Collects the difference of two runs, output by output; `add` for each batch."""

    def __init__(self) -> None:
        self._of: dict[str, _Sums] = {}

    def add(self, reference: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take up one batch. Raises TaskError where the two runs, or this batch and the first one, do not return the
        same tensors."""
        if self._of and list(reference) != list(self._of):
            raise TaskError(
                f"the model returned {', '.join(self._of)} for the first batch and "
                f"{', '.join(reference) or 'no tensor'} for another: compare outputs that each batch has, through "
                "Task(forward=...)"
            )
        if list(reference) != list(tensors):
            raise TaskError(
                f"the model returned {', '.join(reference) or 'no tensor'} in fp32 and "
                f"{', '.join(tensors) or 'no tensor'} in low precision: they cannot be compared"
            )
        for name, r in reference.items():
            y = tensors[name]
            if r.shape != y.shape:
                raise TaskError(
                    f"output {name} has shape {tuple(r.shape)} in fp32 and {tuple(y.shape)} in low precision "
                    "(its size depends on values): compare another output, through Task(forward=...)"
                )
            self._of.setdefault(name, _Sums()).add(r.detach(), y.detach())

    def results(self) -> tuple[OutputDifference, ...]:
        """A row per output, in their order."""
        return tuple(sums.result(name) for name, sums in self._of.items())


class _Sums:
    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.count = self.compared = self.nonfinite = self.nonfinite_reference = self.equal = 0
        self.signal = self.error = self.largest = 0.0

    def add(self, r: Tensor, y: Tensor) -> None:
        self.shape = self.shape or tuple(r.shape)
        self.dtype = str(y.dtype).removeprefix("torch.")
        wide, other = r.double(), y.double()
        same = (wide == other) | (wide.isnan() & other.isnan())
        self.count += r.numel()
        self.equal += int(same.sum())
        self.nonfinite += int((~other.isfinite()).sum())
        self.nonfinite_reference += int((~wide.isfinite()).sum())
        both = wide.isfinite() & other.isfinite()
        self.compared += int(both.sum())
        difference = torch.where(both, other - wide, 0.0)
        self.signal += float(torch.where(both, wide, 0.0).square().sum())
        self.error += float(difference.square().sum())
        if r.numel():
            self.largest = max(self.largest, float(difference.abs().max()))

    def result(self, name: str) -> OutputDifference:
        known = self.compared > 0 or not self.count
        share = _ratio(self.error, self.signal) if known else math.nan
        return OutputDifference(
            name=name,
            shape=self.shape,
            dtype=self.dtype,
            count=self.count,
            relative_l2=share**0.5,
            max_abs=self.largest if known else math.nan,
            sqnr_db=math.inf if share == 0 else -10 * math.log10(share),
            equal=self.equal / self.count if self.count else 1.0,
            nonfinite=self.nonfinite,
            nonfinite_reference=self.nonfinite_reference,
        )


def _ratio(error: float, signal: float) -> float:
    if error == 0:
        return 0.0
    return error / signal if signal else math.inf
