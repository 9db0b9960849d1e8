"""Gradient accumulation: do sums over K micro-batches survive in the format that gradients are stored in?

The gradients of real micro-batches are added up in fp32 and, side by side, in each low format. A sum in p explicit bits
rounds at every addition, and stops growing where one contribution is below half an ulp of it: at 2^(p+1) to 2^(p+2)
times one contribution (bf16: 256 to 512 times, fp16: 2048 to 4096 times), see Higham, Accuracy and Stability of
Numerical Algorithms, section 4.2. Long before that the last additions lose their low bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..advice.storage import storage_reasons, stored_modules
from ..attribution import unwrap
from ..batches import copy_containers
from ..formats import get_format
from ..preservation import preserved
from ..profiles import Profile
from ..tasks import Task
from ..training.devices import own_device, to_device

TOLERANCE = 0.02
"""Relative error of the whole summed gradient that is taken for harmless: a fraction of what a minibatch adds."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sums:
    """Sums over micro-batches in a storage format, against the same sums in fp32.

    format: of the accumulator. count: micro-batches summed in the end. measured: how many of them were really run.
    error: relative error of the summed gradient (2-norm over all parameters) after `count`, extrapolated beyond
    `measured` from its last doubling. worst: (parameter, its relative error) after `measured`. curve: (micro-batches,
    error) at powers of two. swallowed: share of the last micro-batch's non-zero additions that changed nothing.
    """

    format: str
    count: int
    measured: int
    error: float
    worst: tuple[str, float]
    swallowed: float
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)

    @property
    def survives(self) -> bool:
        """Whether the sum is good enough to train with."""
        return self.error <= TOLERANCE

    def __str__(self) -> str:
        stall = 2 ** (get_format(self.format).precision + 1)
        how = "measured" if self.measured >= self.count else f"extrapolated from {self.measured}"
        text = f"a sum over {self.count} micro-batches kept in {self.format} is off by {self.error:.2%} ({how})"
        text += f", worst in {self.worst[0]} ({self.worst[1]:.2%}); {self.swallowed:.1%} of the last additions changed "
        text += f"nothing, and such a sum stops growing at {stall} to {2 * stall} times one contribution"
        return text


def measure_sums(
    task: Task, count: int, *, formats: tuple[str, ...] = ("bf16", "fp16"), limit: int = 256, scale: float = 2.0**16
) -> dict[str, Sums]:
    """Add up the fp32 gradients of min(count, limit) micro-batches in each of `formats` and in fp32.

    Each micro-batch's loss is divided by `count`, as the trainer does, and multiplied by `scale` for fp16 (brought down
    where the sum would overflow). The model, its buffers, gradients and the random generators are left as they were.
    """
    model = unwrap(task.model)
    run = min(count, limit)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    device = own_device(model)
    exact: dict[str, torch.Tensor] = {}
    with preserved(model):
        model.train()
        low = {f: _Low(f, scale if f == "fp16" else 1.0) for f in formats}
        curves: dict[str, list[tuple[int, float]]] = {f: [] for f in formats}
        for index in range(run):
            found = _gradients(task, to_device(copy_containers(task.batch(index)), device), names, count)
            for name, gradient in found.items():
                exact[name] = exact[name] + gradient if name in exact else gradient.clone()
            for fmt, sums in low.items():
                sums.add(found)
                if (index + 1) & index == 0 or index + 1 == run:
                    curves[fmt].append((index + 1, _error(sums, exact)))
    return {f: _result(f, count, run, curves[f], low[f], exact) for f in formats}


def stalled(profile: Profile, fmt: str) -> list[str]:
    """What the recorded run says against sums in `fmt`: a sentence per module whose summed gradient would stop growing
    (advice's rule "accumulation"). The run must have been recorded with the accumulation in question."""
    stored = dict.fromkeys(stored_modules(profile), fmt)
    found = storage_reasons(profile, stored, swallowed=1.0, flushed_state=1.0)
    return [
        f"{unit or '(root)'}: {r.text}" for unit, reasons in found.items() for r in reasons if r.code == "accumulation"
    ]


def _gradients(task: Task, batch: Any, names: list[str], count: int) -> dict[str, torch.Tensor]:
    model = unwrap(task.model)
    (task.checked_loss(batch) / count).backward()
    parameters = dict(model.named_parameters())
    found = {}
    for name in names:
        gradient = parameters[name].grad
        parameters[name].grad = None
        if gradient is not None:
            found[name] = (gradient.to_dense() if gradient.is_sparse else gradient).float()
    return found


class _Low:
    """An accumulator in a low format. scale: of what is added; halved, with the sums, before something overflows."""

    def __init__(self, fmt: str, scale: float) -> None:
        self.dtype, self.scale = _DTYPES[fmt], scale
        self.end = get_format(fmt).max
        self.sums: dict[str, torch.Tensor] = {}
        self.swallowed = 0.0

    def add(self, gradients: Mapping[str, torch.Tensor]) -> None:
        while any(self._reach(n, g) > self.end / 2 for n, g in gradients.items()):
            self.scale /= 2
            for total in self.sums.values():
                total /= 2
        unchanged = added = 0
        for name, gradient in gradients.items():
            term = (gradient * self.scale).to(self.dtype)
            if name not in self.sums:
                self.sums[name] = term
                added += int((term != 0).sum())
                continue
            before = self.sums[name]
            self.sums[name] = before + term
            unchanged += int(((self.sums[name] == before) & (term != 0)).sum())
            added += int((term != 0).sum())
        self.swallowed = unchanged / max(added, 1)

    def _reach(self, name: str, gradient: torch.Tensor) -> float:
        total = self.sums.get(name)
        return self.scale * float(gradient.abs().max()) + (float(total.abs().max()) if total is not None else 0.0)


def _errors(sums: _Low, exact: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Parameter -> (squared error, squared size)."""
    found = {}
    for name, total in exact.items():
        error = sums.sums[name].double() / sums.scale - total.double()
        found[name] = float(error.square().sum()), float(total.double().square().sum())
    return found


def _error(sums: _Low, exact: Mapping[str, torch.Tensor]) -> float:
    found = _errors(sums, exact).values()
    size = sum(s for _, s in found)
    return math.sqrt(sum(e for e, _ in found) / size) if size else 0.0


def _result(
    fmt: str, count: int, run: int, curve: list[tuple[int, float]], low: _Low, exact: Mapping[str, torch.Tensor]
) -> Sums:
    each = {n: math.sqrt(e / s) for n, (e, s) in _errors(low, exact).items() if s}
    worst = max(each, key=each.__getitem__, default="")
    return Sums(fmt, count, run, _extrapolated(curve, count), (worst, each.get(worst, 0.0)), low.swallowed,
                tuple(curve))  # fmt: skip


def _extrapolated(curve: list[tuple[int, float]], count: int) -> float:
    """The error after `count`, which grows on as it did over the last doubling that was measured (at least like the
    square root: independent roundings add up so), at most to that of a sum to which nothing is added any more."""
    end, last = curve[-1]
    if end >= count or len(curve) < 3 or not last:
        return last
    before, earlier = curve[-2]
    growth = math.log(last / earlier) / math.log(end / before) if earlier else 0.5
    stopped = 1 - (1 - min(last, 1.0)) * end / count
    return min(stopped, last * (count / end) ** max(growth, 0.5))
