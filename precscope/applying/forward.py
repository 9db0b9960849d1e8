"""The planned forward of a module."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..preservation import warn_of_lowered_backward
from .attention import LowAttention
from .devices import device_type, tf32_switches
from .fp8 import fake_quantise, quantise_gradient
from .inputs import cast_input, cast_up, fit, map_tensors, round_input
from .scaled import product
from .spec import MARK, Spec
from .swaps import Swap, strayed, swap_back, swap_in

_functions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Forward of a class -> its planned forward."""


def install(module: nn.Module) -> None:
    """Give `module` its planned forward, bound to it."""
    spec: Spec = module.__dict__[MARK]
    spec.previous = module.__dict__.get("forward")
    own = type(module).forward
    if spec.previous is not None:
        function = _planned_function(spec.previous, bound=True)
    elif (function := _functions.get(own)) is None:
        function = _functions[own] = _planned_function(own, bound=False)
    module.__dict__["forward"] = types.MethodType(function, module)


def _planned_function(own: Callable[..., Any], *, bound: bool) -> Any:
    """`_planned_forward` under the signature of `own`, which data collators and exporters read. All share one code
    object, so that torch.compile compiles it once for modules that run alike."""
    function: Any = types.FunctionType(_planned_forward.__code__, _planned_forward.__globals__, "forward")
    setattr(function, MARK, True)
    function.__doc__ = own.__doc__
    try:
        signature = inspect.signature(own)
    except (TypeError, ValueError):
        return function  # a callable that does not tell its signature
    if bound:
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = signature.replace(parameters=[itself, *signature.parameters.values()])
    function.__signature__ = signature
    return function


def _planned_forward(self, *args, **kwargs):
    """What runs instead of the module's forward. Written without anything torch.compile would have to break for."""
    spec = getattr(self, "_precscope_plan", None)
    if spec is None:  # the plan is off, and somebody who wrapped the forward meanwhile kept this one
        return type(self).forward(self, *args, **kwargs)
    now = spec.now
    around = now.region
    if around == spec.region:
        if spec.kind == "autocast" and spec.fp8 is None:
            return _own_forward(self, spec, args, kwargs)
        return _run(self, spec, args, kwargs)
    around_kind, around_dtype, around_attention = now.kind, now.dtype, now.attention
    now.region, now.kind, now.dtype, now.attention = spec.region, spec.kind, spec.dtype, spec.attention
    try:
        output = _run_region(self, spec, args, kwargs)
    finally:
        now.region, now.kind, now.dtype, now.attention = around, around_kind, around_dtype, around_attention
    if spec.weight and around_kind == "cast":  # what multiplies with it runs in that dtype alone
        return map_tensors(output, partial(cast_input, kind="cast", dtype=around_dtype))
    if spec.kind == "fp32":
        return output
    if around_kind == "fp32":
        return map_tensors(output, cast_up)  # the code of an fp32 module is not under autocast: it cannot mix dtypes
    if around_kind == "autocast" and around_dtype is not spec.dtype:  # nor can autocast mix its dtype with another
        return map_tensors(output, partial(cast_input, kind="autocast", dtype=around_dtype))
    return output


def _run_region(self, spec, args, kwargs):
    """The forward of a region's outermost module, under the autocast state of the region."""
    device = device_type(self, args, kwargs)
    if spec.tf32 is not None and device == "cuda" and not torch.compiler.is_compiling():
        with tf32_switches(spec.tf32), torch.autocast(device, enabled=False):
            return _run(self, spec, args, kwargs)
    if spec.attention and device == "cpu":
        with LowAttention(spec.now):
            return _run_on(device, self, spec, args, kwargs)
    return _run_on(device, self, spec, args, kwargs)


def _run_on(device, self, spec, args, kwargs):
    enabled = torch.is_autocast_enabled(device)
    if spec.kind == "autocast":
        if enabled and torch.get_autocast_dtype(device) == spec.dtype:
            return _run(self, spec, args, kwargs)
        with torch.autocast(device, dtype=spec.dtype):
            return _run(self, spec, args, kwargs)
    if enabled:
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            warn_of_lowered_backward()
        with torch.autocast(device, enabled=False):
            return _run(self, spec, args, kwargs)
    return _run(self, spec, args, kwargs)


def _own_forward(module: nn.Module, spec: Spec, args: tuple, kwargs: dict) -> Any:
    if spec.previous is not None:
        return spec.previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _run(module: nn.Module, spec: Spec, args: tuple, kwargs: dict) -> Any:
    """The module's forward on cast inputs, with cast tensors where storage and compute differ."""
    cast = partial(cast_input, kind=spec.kind, dtype=spec.dtype)
    if kwargs or not fit(args, spec.dtype):
        args, kwargs = map_tensors(args, cast), map_tensors(kwargs, cast)
    if spec.lookup:
        return map_tensors(_own_forward(module, spec, args, kwargs), cast)
    swap = spec.swap or ((module,) if strayed(module, spec) else ())
    if not swap and spec.fp8 is None:
        return _own_forward(module, spec, args, kwargs)
    swapped: list[Swap] = []
    try:
        swap_in(swap, spec, swapped)
        if spec.fp8 is None:
            return _own_forward(module, spec, args, kwargs)
        if spec.native and (output := product(module, args, kwargs, spec.native)) is not None:
            return output
        parameters: dict[str, Any] = module._parameters
        weight = parameters["weight"]
        rounded = fake_quantise(weight, spec.fp8)
        swapped.append(Swap(parameters, "weight", weight, rounded, None, merge=False))
        parameters["weight"] = rounded
        operand = partial(round_input, fmt=spec.fp8)
        args, kwargs = map_tensors(args, operand), map_tensors(kwargs, operand)
        return quantise_gradient(_own_forward(module, spec, args, kwargs))
    finally:
        swap_back(module, swap, swapped)
