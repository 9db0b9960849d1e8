"""The tools that benchmarks/peers.py puts beside precscope: how each watches a model, and what it records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class ToolMissing(Exception):
    """A tool's package is not installed; the message names it."""


@dataclass(frozen=True)
class Tool:
    """How a tool watches, and what a reader of its record learns.

    roles: whose tensors. statistics: what is kept of each. answers: whether that says what a number format would do.
    beyond_max: whether it looks at the values of tensors for more than one maximum, or for whether one is NaN.
    watch: enters the tool for a model. each_step: entered around forward and backward of each step, not once.
    """

    name: str
    roles: str
    statistics: str
    answers: str
    beyond_max: bool
    watch: Callable[[nn.Module], AbstractContextManager[Any]]
    each_step: bool = False


@contextmanager
def hooked(model: nn.Module, see: Callable[[Tensor], object]) -> Iterator[None]:
    """`see` called with each output tensor of each leaf module, and with its gradient."""

    def forward(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                see(tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: (see(grad.detach()), None)[1])

    handles = [m.register_forward_hook(forward) for m in model.modules() if not list(m.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_bins(x: Tensor) -> Tensor:
    """The lightest histogram that torch offers: 64 bins between the smallest and the largest value."""
    return torch.histc(x.float(), bins=64)


def logged_bins(x: Tensor) -> tuple[list[float], list[float]] | None:
    """What loggers such as wandb.watch do with a tensor: drop what is not finite, read both ends, fill 64 bins
    between them and hand them on as lists."""
    flat = x.reshape(-1).float()
    finite = torch.isfinite(flat)
    if not finite.any().item():
        return None
    if not finite.all().item():
        flat = flat[finite]
    low, high = flat.min().item(), flat.max().item()
    if low == high:
        return [float(flat.numel())], [low, high]
    return torch.histc(flat, bins=64, min=low, max=high).tolist(), torch.linspace(low, high, 65).tolist()


def exponents(x: Tensor) -> Tensor:
    """An exponent histogram by torch operations."""
    _, exponent = torch.frexp(x.float())
    return torch.bincount((exponent.flatten() + 200).clamp_(0, 400), minlength=401)


@contextmanager
def underflow_overflow(model: nn.Module) -> Iterator[None]:
    """Hugging Face's detector. Its hooks stay on the model."""
    try:
        from transformers.debug_utils import DebugUnderflowOverflow
    except ImportError as error:
        raise ToolMissing("transformers is not installed") from error
    DebugUnderflowOverflow(model)
    yield


def debug_mode(model: nn.Module) -> AbstractContextManager[Any]:
    """PyTorch's own log of ops."""
    try:
        from torch.utils._debug_mode import DebugMode
    except ImportError as error:
        raise ToolMissing("this torch has no DebugMode") from error
    return DebugMode()


@contextmanager
def tensor_tracker(model: nn.Module) -> Iterator[None]:
    """Graphcore's tracker with its table: copies of tensors, then a standard deviation of each."""
    try:
        import tensor_tracker as package
    except ImportError as error:
        raise ToolMissing("tensor-tracker is not installed") from error
    with package.track(model) as tracker:
        yield
    tracker.to_frame()


@contextmanager
def copies(model: nn.Module) -> Iterator[None]:
    """What such a tracker does, where it is not installed: a copy of each tensor, a standard deviation afterwards."""
    kept: list[Tensor] = []
    with hooked(model, lambda x: kept.append(x.clone())):
        yield
    for tensor in kept:
        torch.std(tensor).item()


BESIDE = "outputs and their gradients, leaf modules"
TOOLS = (
    Tool("amax hook, .item()", BESIDE, "one maximum", "whether it overflows", False,
         lambda model: hooked(model, lambda x: x.abs().max().item())),
    Tool("histc hooks", BESIDE, "64 linear bins", "no", True, lambda model: hooked(model, linear_bins)),
    Tool("histc hooks as logged", BESIDE, "finite or not, both ends, 64 linear bins", "no", True,
         lambda model: hooked(model, logged_bins)),
    Tool("frexp hooks", BESIDE, "exponent histogram", "any, but for inf, NaN, zeros and errors", True,
         lambda model: hooked(model, exponents)),
    Tool("DebugUnderflowOverflow", "weights, inputs, outputs; forward only", "|x| smallest and largest, inf, NaN",
         "whether it overflows", True, underflow_overflow),
    Tool("copy hooks, std", BESIDE, "copies, then one standard deviation", "no", True, copies, each_step=True),
    Tool("tensor-tracker, table", "outputs and their gradients, all modules", "copies, then one standard deviation",
         "no", True, tensor_tracker, each_step=True),
    Tool("detect_anomaly", "gradients of every op", "NaN or not, and the forward line", "no", False,
         lambda model: torch.autograd.detect_anomaly(check_nan=True), each_step=True),
    Tool("DebugMode", "every op", "names and shapes, no values", "no", False, debug_mode, each_step=True),
)  # fmt: skip
