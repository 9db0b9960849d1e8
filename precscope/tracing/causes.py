"""The likely cause, in words with numbers, of an op that makes non-finite values out of finite ones.

The op is run once more on its inputs in a wider format (`Incident.wide`): what is finite there overflowed, what is not
is undefined in any format (0/0, log of 0) on these inputs, whatever made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..formats import FloatFormat
from .finding import TensorRange


@dataclass(frozen=True)
class Flush:
    """A constant that became 0: an eps below what the format holds. op: that used it."""

    constant: float
    format: str
    op: str


@dataclass
class Incident:
    """One op that made non-finite values.

    op: its bare name ("pow"). args, inputs: its arguments as they were before, and the floating tensors among them.
    output: the first output that is not finite. wide: the same from inputs in fp32 (fp64), None where not to be had.
    format: of the output, None where it is no float. flush: a constant flushed nearby. node: autograd node, "" in
    forward. loss_scale: of this backward, None in forward. maker: who made the first input, in words, "" if unknown.
    """

    op: str
    args: tuple[Any, ...]
    inputs: list[torch.Tensor]
    ranges: tuple[TensorRange, ...]
    output: torch.Tensor
    output_range: TensorRange
    wide: torch.Tensor | None
    format: FloatFormat | None
    flush: Flush | None = None
    node: str = ""
    loss_scale: float | None = None
    maker: str = ""

    @cached_property
    def wide_amax(self) -> float | None:
        """The largest magnitude that is finite in the wider format but not in the output."""
        if self.wide is None or self.wide.shape != self.output.shape:
            return None
        lost = self.wide[self.wide.isfinite() & ~self.output.isfinite().to(self.wide.device)]
        return lost.abs().max().item() if lost.numel() else None

    @cached_property
    def at(self) -> list[float] | None:
        """Values of the inputs that belong to the first non-finite element, where they can be broadcast to it."""
        found: list[float] = []
        try:
            index = tuple((~self.output.isfinite()).nonzero()[0].tolist())
            for x in self.inputs:
                found.append(torch.broadcast_to(x, self.output.shape)[index].item())
        except (RuntimeError, IndexError):
            return None
        return found

    @property
    def amax(self) -> float:
        """The largest magnitude among the inputs."""
        return max((r.amax for r in self.ranges), default=0.0)

    @property
    def limit(self) -> str:
        """ "beyond fp16's 65504" """
        if self.format and self.wide_amax is not None and self.wide_amax < self.format.max:
            return f"within {self.format}, yet lost: a partial result overflowed, or a smaller format is emulated"
        return f"beyond {self.format}'s {self.format.max:.5g}" if self.format else "not finite"


def explain(incident: Incident) -> tuple[str, str]:
    """(kind, cause): kind "overflow" or "invalid" as in Finding; the cause is one sentence, with numbers."""
    says = _SAYS.get(incident.op)
    text = says(incident) if says else None
    if text is None:
        text = _general(incident)
    kind = "invalid" if incident.output_range.nan and incident.wide_amax is None else "overflow"
    return kind, f"{incident.op}: {text}{_scale_note(incident)}{_backward_note(incident)}"


# ops one by one: each returns None where its own case does not apply


def _pow(i: Incident) -> str | None:
    exponent = i.args[1] if len(i.args) > 1 and isinstance(i.args[1], int | float) else None
    if i.op == "square":
        exponent = 2
    if exponent is None or not i.ranges:
        return None
    if exponent < 0:
        return _of_zero(i, f"to the power {exponent:g}")
    if i.output_range.nan and exponent != int(exponent):
        return f"a negative number ({i.ranges[0].low:.4g}) to the power {exponent:g} is not a number"
    word = {2.0: "square", 3.0: "cube"}.get(float(exponent), f"power {exponent:g}")
    # the square of what is left of the range of the exponent: pow itself may be beyond a float
    result = math.exp(min(exponent * math.log(i.ranges[0].amax), 700.0)) if i.ranges[0].amax else 0.0
    return f"input reaches {i.ranges[0].amax:.4g}, its {word} {result:.3g} is {i.limit}"


def _div(i: Incident) -> str | None:
    if len(i.inputs) < 2:
        divisor = i.args[1] if len(i.args) > 1 and isinstance(i.args[1], int | float) else None
        if divisor is None:
            return None
        return f"{i.amax:.4g} divided by {divisor:.3g} is {i.limit}"
    over, under = (torch.broadcast_to(x, i.output.shape) for x in i.inputs[:2])
    both = int(((over == 0) & (under == 0)).sum())
    if both and i.output_range.nan:
        return f"0/0 in {_count(both, i.output.numel())}{_flush_note(i)}"
    zero = int((under == 0).sum())
    if zero:
        return f"division of up to {i.ranges[0].amax:.3g} by 0 in {_count(zero, i.output.numel())}{_flush_note(i)}"
    if i.at is not None and all(map(math.isfinite, i.at)):
        return f"{i.at[0]:.4g} / {i.at[1]:.3g} is {_result(i)}{_flush_note(i)}"
    return _from_infinite(i)


def _quotient_added(i: Incident) -> str | None:
    if len(i.inputs) < 3 or i.output.shape != i.inputs[2].shape:
        return None
    over, under = i.inputs[1], i.inputs[2]
    both, zero = int(((over == 0) & (under == 0)).sum()), int((under == 0).sum())
    if not zero:
        return None
    word = f"0/0 in {_count(both, under.numel())}" if both else f"division by 0 in {_count(zero, under.numel())}"
    return f"{word}{_flush_note(i)}"


def _log(i: Incident) -> str | None:
    r = i.ranges[0]
    if i.output_range.nan and r.low < 0:
        return f"of a negative number ({r.low:.4g})"
    if r.zeros:
        return f"of 0 in {_count(r.zeros, r.count)}{_flushed_values_note(i)}{_flush_note(i)}"
    return None


def _root(i: Incident) -> str | None:
    r = i.ranges[0]
    if i.output_range.nan and r.low < 0:
        return (
            f"of a negative number ({r.low:.4g}); if it should not be below 0 (a variance as E[x^2] - E[x]^2), its "
            "terms cancelled"
        )
    return _of_zero(i, "")


def _of_zero(i: Incident, word: str) -> str | None:
    r = i.ranges[0]
    if r.zeros:
        return f"0 {word} ".rstrip() + f" in {_count(r.zeros, r.count)}{_flushed_values_note(i)}{_flush_note(i)}"
    return f"of {r.amin_nonzero:.3g} is {_result(i)}"


def _exp(i: Incident) -> str | None:
    high = i.ranges[0].high
    return f"of {high:.4g} is {math.exp(high) if high < 700 else math.inf:.3g}, {i.limit}"


def _product(i: Incident) -> str | None:
    if i.at is None:
        return None
    values = [*i.at, *(float(a) for a in i.args[1:2] if isinstance(a, int | float))]
    if any(v == 0 for v in values) and any(math.isinf(v) for v in values):
        return "0 * inf"
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return f"{values[0]:.4g} * {values[1]:.4g} is {_result(i)}"


def _sum_of_two(i: Incident) -> str | None:
    if i.at is None:
        return None
    if len(i.at) == 2 and all(map(math.isinf, i.at)):
        return "inf - inf"
    if len(i.at) < 2 or not all(map(math.isfinite, i.at)):
        return None
    sign = "-" if i.op.startswith(("sub", "rsub")) else "+"
    return f"{i.at[0]:.4g} {sign} {i.at[1]:.4g} is {_result(i)}"


def _cast(i: Incident) -> str | None:
    source = i.ranges[-1]
    by = f", made by {i.maker}" if i.maker else ""
    return f"cast from {source.dtype} to {i.format}: values reach {source.amax:.4g}, {i.limit}{by}"


def _sum(i: Incident) -> str | None:
    terms = i.inputs[0].numel() // max(1, i.output.numel())
    if not all(r.finite for r in i.ranges):
        return _from_infinite(i)
    return f"over {terms} elements of up to {i.ranges[0].amax:.4g} comes to {_result(i)}"


def _matmul(i: Incident) -> str | None:
    if not all(r.finite for r in i.ranges):
        return _from_infinite(i)
    left, right = i.ranges[-2:]  # the bias, where there is one, comes first
    if i.op.startswith(("convolution", "linear")):
        left, right = i.ranges[:2]
    if i.op.startswith("convolution"):
        terms = right.count // max(1, right.shape[0])
    else:
        terms = left.shape[-1] if left.shape else 1
    return f"sums of {terms} products ({left.amax:.4g} times {right.amax:.4g} at most) reach {_result(i)}"


def _softmax(i: Incident) -> str | None:
    x = i.inputs[0]
    if i.ranges[0].pos_inf:
        return "of +inf: inf - inf"
    dim = i.args[1] if len(i.args) > 1 and isinstance(i.args[1], int) else -1
    masked = (x == float("-inf")).all(dim=dim)
    rows = int(masked.sum())
    return f"a row is -inf throughout, nothing to choose from ({_count(rows, masked.numel(), 'row')})" if rows else None


def _attention(i: Incident) -> str | None:
    if len(i.ranges) < 2 or not all(r.finite for r in i.ranges[:3]):
        return _from_infinite(i)
    return f"query reaches {i.ranges[0].amax:.4g}, key {i.ranges[1].amax:.4g}; the result is {_result(i)}"


_SAYS: dict[str, Callable[[Incident], str | None]] = {
    **dict.fromkeys(("pow", "pow_", "square"), _pow),
    **dict.fromkeys(("div", "div_", "true_divide"), _div),
    **dict.fromkeys(("addcdiv", "addcdiv_"), _quotient_added),
    **dict.fromkeys(("log", "log2", "log10", "log_"), _log),
    **dict.fromkeys(("sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_"), _root),
    **dict.fromkeys(("exp", "exp_", "exp2", "expm1", "sinh", "cosh"), _exp),
    **dict.fromkeys(("mul", "mul_"), _product),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _sum_of_two),
    **dict.fromkeys(("_to_copy", "copy_"), _cast),
    **dict.fromkeys(("sum", "cumsum", "mean", "linalg_vector_norm", "norm", "var", "var_mean", "std"), _sum),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "dot", "mv"), _matmul),
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}


# words


def _general(i: Incident) -> str:
    from_infinite = _from_infinite(i)
    if from_infinite:
        return from_infinite
    if i.wide_amax is not None:
        return f"inputs reach {i.amax:.4g}, the result {_result(i)}"
    what = "not a number" if i.output_range.nan else "infinite"
    return f"finite inputs (up to {i.amax:.4g}) give a result that is {what} in any format{_flush_note(i)}"


def _from_infinite(i: Incident) -> str | None:
    bad = [r for r in i.ranges if not r.finite]
    if not bad:
        return None
    inf = sum(r.pos_inf + r.neg_inf for r in bad)
    return f"NaN out of inputs with {_count(inf, sum(r.count for r in bad))} inf" if inf else "inputs hold NaN"


def _result(i: Incident) -> str:
    return f"{i.wide_amax:.4g}, {i.limit}" if i.wide_amax is not None else i.limit


def _count(n: int, total: int, word: str = "element") -> str:
    return f"{n} of {total} {word}s" if total != 1 else f"the only {word}"


def _flush_note(i: Incident) -> str:
    if i.flush is None:
        return ""
    return f"; the constant {i.flush.constant:g} of {i.flush.op} is 0 in {i.flush.format}"


def _flushed_values_note(i: Incident) -> str:
    name = i.ranges[0].dtype
    if name not in ("fp16", "bf16"):
        return ""
    least = 2.0**-25 if name == "fp16" else 2.0**-134
    return f" ({name} holds nothing below {least:.2g})"


_OF_VALUES = ("pow", "square", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid")


def _scale_note(i: Incident) -> str:
    if i.loss_scale in (None, 1.0) or i.wide_amax is None or i.format is None:
        return ""
    if i.op.rstrip("_") in _OF_VALUES:
        return ""  # backward applies these to values of the forward pass, which carry no loss scale
    without = i.wide_amax / i.loss_scale
    if without > i.format.max:
        return f"; even without the loss scale {i.loss_scale:g} it would be {without:.3g}"
    return f"; without the loss scale {i.loss_scale:g} it would be {without:.3g}: a smaller scale avoids it"


def _backward_note(i: Incident) -> str:
    if i.node.startswith("Sqrt") and i.output_range.dtype and any(r.zeros for r in i.ranges):
        return "; the slope of sqrt at 0 is infinite"
    if i.node.startswith(("LinalgVectorNorm", "Norm")) and any(r.zeros for r in i.ranges):
        return "; a norm has no gradient at 0"
    return ""
