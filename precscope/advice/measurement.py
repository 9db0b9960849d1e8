"""Measuring what each module costs: every distinct one (type, configuration, shapes) is run alone on inputs captured
from a real batch, forward and backward, in each format; a module with children is charged what remains after theirs.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import one_line
from ..preservation import eager
from ..recording.tensors import call_tensors, named_tensors
from ..recording.watcher import watched_modules

_AT_LEAST_S = 0.03
_REPEATS = (2, 5)
_SLOW_S = 0.25


def measure(
    model: nn.Module,
    run: Callable[[], Any],
    formats: Sequence[str],
    *,
    progress: Callable[[str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Measure every module that `run()` (one forward pass of `model`) calls.

    progress: called with the name of each module. note: called with a line for each module that does not run alone in
    some format: it has no row in any, so that its cost is modelled and no format of it is taken for emulated.
    Returns a row per module and format: module, format, time_ms (forward and backward of one pass, children not
    counted), how, cast_ms_per_element. Parameters and gradients are left as they were, hooks taken off; buffers and RNG
    are for the caller to preserve. What `run` itself raises passes through.
    """
    with eager():
        calls = _capture(model, run)
        inclusive = _time_all(calls, _timed(formats, calls), progress, note)
        cast = _cast_cost(next(iter(calls.values())).device) if calls else 1e-6
    rows = [
        {
            "module": name,
            "format": fmt,
            "time_ms": max(time_ms - _below(calls[name], inclusive, fmt), 0.0) * calls[name].count,
            "how": "measured",
            "cast_ms_per_element": cast,
        }
        for name in calls
        for fmt, time_ms in inclusive.get(name, {}).items()
    ]
    return pd.DataFrame(rows, columns=["module", "format", "time_ms", "how", "cast_ms_per_element"])


def _timed(formats: Sequence[str], calls: dict[str, _Call]) -> list[str]:
    """Those of `formats` that run here as they would in training: e4m3 where the device multiplies it."""
    from ..applying.scaled import missing_on

    native = bool(calls) and not missing_on(next(iter(calls.values())).device)
    return [f for f in formats if f in ("fp32", "bf16", "fp16") or (f == "e4m3" and native)]


def _time_all(
    calls: dict[str, _Call],
    formats: Sequence[str],
    progress: Callable[[str], None] | None,
    note: Callable[[str], None] | None,
) -> dict[str, dict[str, float]]:
    """ms of one call by module and format, children counted; a module that fails in one format is left out."""
    inclusive: dict[str, dict[str, float]] = {}
    known: dict[Any, dict[str, float] | None] = {}
    for name in sorted(calls, key=lambda n: -n.count(".") - bool(n)):  # children before their parents
        call = calls[name]
        if progress is not None:
            progress(name)
        if call.signature not in known:
            times: dict[str, float] = {}
            known[call.signature] = times
            for fmt in formats:
                try:
                    times[fmt] = _time_one(call, inclusive, times, fmt)
                except Exception as error:  # whatever the user's module raises when it runs alone
                    known[call.signature] = None
                    if note is not None:
                        note(_failure(name, call, fmt, error))
                    break
        found = known[call.signature]
        if found is not None:
            inclusive[name] = found
    return inclusive


def _time_one(call: _Call, inclusive: dict[str, dict[str, float]], times: dict[str, float], fmt: str) -> float:
    """Measured, unless its children show already that `fmt` is slow: then theirs plus what fp32 takes beside them."""
    below, below32 = _below(call, inclusive, fmt), _below(call, inclusive, "fp32")
    if "fp32" in times and below > 3 * max(below32, 0.05):
        return below + max(times["fp32"] - below32, 0.0)
    return call.time_ms(fmt)


def _below(call: _Call, inclusive: dict[str, dict[str, float]], fmt: str) -> float:
    return sum(inclusive.get(child, {}).get(fmt, 0.0) for child in call.children)


def _failure(name: str, call: _Call, fmt: str, error: Exception) -> str:
    return (
        f"{name or 'the model'} ({type(call.module).__name__}) does not run alone in {fmt} "
        f"({one_line(error, limit=100)}): its cost is modelled, not measured"
    )


class _Call:
    """A module with the arguments of its first call."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.args, self.kwargs = args, kwargs
        self.count = 1
        self.children: list[str] = []
        shapes = tuple((path, tuple(x.shape), str(x.dtype)) for path, x in call_tensors(args, kwargs))
        parameters = tuple(tuple(p.shape) for p in module.parameters())
        self.signature = (type(module), module.extra_repr(), module.training, shapes, parameters)

    @property
    def device(self) -> torch.device:
        found = [x.device for _, x in call_tensors(self.args, self.kwargs)]
        found += [p.device for p in self.module.parameters()]
        return found[0] if found else torch.device("cpu")

    def time_ms(self, fmt: str) -> float:
        """Median time of forward and backward under `fmt`; a slow format is timed on an eighth of the batch."""
        share = 1.0
        if fmt == "fp16" and self.device.type == "cpu":
            share, small = self._smaller(8)
            try:
                first = small._median_ms(fmt) / share
            except Exception:  # a module may not take a part of its batch: time it whole
                first, share = 0.0, 1.0
            if share < 1 and first > 1e3 * _SLOW_S / 4:
                return first
        return self._median_ms(fmt)

    def _smaller(self, parts: int) -> tuple[float, _Call]:
        """This call on 1/parts of its leading dimension, where every tensor argument shares one."""
        found = call_tensors(self.args, self.kwargs)
        leading = {x.shape[0] for _, x in found if x.dim()}
        if len(leading) != 1 or min(leading) < parts or any(not x.dim() for _, x in found):
            return 1.0, self
        keep = next(iter(leading)) // parts
        cut = _map_tensors(lambda x: x[:keep], (self.args, self.kwargs))
        return keep / next(iter(leading)), _Call(self.module, *cut)

    def _median_ms(self, fmt: str) -> float:
        self._once(fmt)
        times: list[float] = []
        while len(times) < _REPEATS[0] or (sum(times) < _AT_LEAST_S and len(times) < _REPEATS[1]):
            times.append(self._once(fmt))
            if times[0] > _SLOW_S:
                break
        return statistics.median(times) * 1e3

    def _once(self, fmt: str) -> float:
        """Seconds of one forward and backward. The module gets copies of its arguments: it may work in place."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.bfloat16}.get(fmt)
        device = self.device

        def leaf(x: torch.Tensor) -> torch.Tensor:
            if not x.is_floating_point():
                return x.clone()
            return x.detach().to(low or torch.float32).requires_grad_()

        args, kwargs = _map_tensors(leaf, (self.args, self.kwargs))
        leaves = [x for _, x in call_tensors(args, kwargs) if x.requires_grad]
        with torch.enable_grad():  # autograd refuses in-place work on a leaf, not on its copy
            args, kwargs = _map_tensors(lambda x: x.clone() if x.requires_grad else x, (args, kwargs))
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        autocast = torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None)
        with self._in_8_bits() if fmt == "e4m3" else contextlib.nullcontext():
            _synchronize(device)
            start = time.perf_counter()
            with torch.enable_grad(), autocast:
                output = self.module(*args, **kwargs)
            outputs = [y for _, y in named_tensors(output) if y.requires_grad]
            if outputs:
                ones = [torch.ones_like(y) for y in outputs]
                torch.autograd.grad(outputs, [*leaves, *parameters], ones, allow_unused=True)
            _synchronize(device)
            return time.perf_counter() - start

    def _in_8_bits(self) -> contextlib.AbstractContextManager[Any]:
        """The module under a plan of e4m3."""
        from ..applying import apply
        from ..plans import PrecisionPlan

        return apply(PrecisionPlan.uniform("e4m3"), self.module)


def _capture(model: nn.Module, run: Callable[[], Any]) -> dict[str, _Call]:
    """One forward pass, gradients on for a loss that takes one itself; the first call of every module with its
    arguments. Calls that checkpointing repeats inside a backward pass are left out."""
    calls: dict[str, _Call] = {}
    names = watched_modules(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        if torch._C._current_graph_task_id() != -1:
            return
        if name in calls:
            calls[name].count += 1
        else:
            detached = _map_tensors(lambda x: x.detach(), (args, kwargs))
            calls[name] = _Call(module, *detached)

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in names]
    try:
        with torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for name in calls:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in calls:
                calls[parent].children.extend([name] * (calls[name].count // calls[parent].count or 1))
                break
    return calls


def _map_tensors(f: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    return tree_map(lambda x: f(x) if isinstance(x, torch.Tensor) else x, value)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cast_cost(device: torch.device) -> float:
    """ms per element of a cast fp32 -> bf16, from one of 2^20 elements."""
    x = torch.randn(1 << 20, device=device)
    times = []
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        x.to(torch.bfloat16)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3 / x.numel()
