"""Which operation of a module does the harm: its ops in fp32 beside the same ops with the module alone in a low format.

The first op whose result is not finite although fp32's is, else the one at which the relative error grows most.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attribution import Attribution
from ..formats import get_format

_MOST = 1 << 15  # elements of a result that are compared
_SKIPPED = (
    "_to_copy", "copy_", "detach", "clone", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t",
    "slice", "select", "unsqueeze", "squeeze", "as_strided", "alias", "empty", "empty_like", "new_empty", "contiguous",
    "unbind", "split", "chunk", "zeros", "zeros_like", "ones", "ones_like", "new_zeros", "full", "arange",
    "scalar_tensor",
)  # fmt: skip

_FIXES = (
    (("pow", "square", "mul", "matmul", "mm", "bmm", "addmm", "baddbmm", "convolution", "einsum"), "overflow",
     "scale the operands before the product (a query by 1/sqrt(d), say), or clamp"),
    (("sum", "cumsum", "index_add", "scatter_add", "mean", "norm", "logsumexp"), "",
     "accumulate in fp32, or use a mean"),
    (("exp", "expm1", "softmax", "_softmax"), "overflow", "subtract the maximum first"),
    (("log", "log2", "log10", "rsqrt", "sqrt", "pow"), "negative",
     "a variance as the mean of (x - mean)^2, or clamp at 0 first"),
    (("log", "div", "rsqrt", "reciprocal", "sqrt"), "nonfinite",
     "an eps that the format holds (1e-4 or more for fp16)"),
    (("masked_fill", "where"), "", "torch.finfo(x.dtype).min or -inf as the fill value"),
    (("argmax", "argmin", "topk", "sort", "round", "floor", "searchsorted", "bucketize"), "",
     "decide in fp32: cast before the comparison"),
    (("cos", "sin"), "", "compute the angle in fp32 and cast the result"),
    (("sub", "add", "rsub"), "cancellation", "centre the values first, or subtract in fp32"),
    (("sigmoid", "tanh"), "", "take the logits in fp32, or return logits"),
)  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """op: "aten.pow". phase: "forward" or "backward". text: what it does, with numbers. fix: what else would help, ""
    where nothing is known."""

    op: str
    phase: str
    text: str
    fix: str
    numbers: dict[str, float]


@dataclass
class _Result:
    op: str
    phase: str
    values: torch.Tensor
    input_amax: float
    inputs_finite: bool
    input_min: float = 0.0


class OpLog(TorchDispatchMode):
    """Keeps what the ops of some modules give. units: their names, children not included."""

    def __init__(self, who: Attribution, units: Collection[str]) -> None:
        super().__init__()
        self._who = who
        self.results: dict[str, list[_Result]] = {unit: [] for unit in units}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        where = self._who.where()
        out = func(*args, **(kwargs or {}))
        kept = self.results.get(where.module)
        name = func._schema.name.removeprefix("aten::").rstrip("_") if hasattr(func, "_schema") else str(func)
        if kept is None or not where.inside or name in _SKIPPED:
            return out
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() and x.dtype is not torch.bool and not x.is_complex():
                kept.append(_Result(name, where.phase, _sampled(x), *_range(given)))
                break
        return out


def explain(exact: list[_Result], low: list[_Result], fmt: str) -> Explanation | None:
    """What the ops of one module tell; None where they do not differ enough to tell anything."""
    pairs = _aligned(exact, low)
    for a, b in pairs:
        if b.inputs_finite and not bool(b.values.isfinite().all()) and bool(a.values.isfinite().all()):
            return _explained(a, b, math.inf, fmt)
    ulp = 2.0 ** -get_format(fmt).precision
    found = _largest_jump(pairs, _error, least=max(2 * ulp, 0.01), before=ulp / 2)
    if found is not None:
        return _explained(*found, fmt)
    # a small error of a large value can be all that told its values apart
    found = _largest_jump(pairs, _centred_error, least=max(4 * ulp, 0.05), before=ulp / 2)
    return None if found is None else _explained(*found, fmt, centred=True)


Pair = tuple[_Result, _Result]


def _largest_jump(
    pairs: list[Pair], error_of: Callable[[torch.Tensor, torch.Tensor], float], *, least: float, before: float
) -> tuple[_Result, _Result, float] | None:
    """The op at which the error grows most over what it was before, if to more than `least`."""
    best, found = 1.0, None
    for a, b in pairs:
        error = error_of(a.values, b.values)
        if error > least and error / before > best:
            best, found = error / before, (a, b, error)
        before = max(before, error if math.isfinite(error) else 0.0)
    return found


def _explained(a: _Result, b: _Result, error: float, fmt: str, *, centred: bool = False) -> Explanation:
    form, op = get_format(fmt), f"aten.{a.op}"
    amax = _range([a.values])[0]
    numbers = {"input_amax": a.input_amax, "output_amax": amax}
    made = f"{op} ({a.phase}) makes values up to {amax:.4g} from values up to {a.input_amax:.4g}"

    def said(text: str, kind: str, **more: float) -> Explanation:
        return Explanation(op, a.phase, f"{made}; {text}", _fix(a.op, kind), numbers | more)

    if math.isinf(error) and amax > form.max:
        return said(f"{fmt} ends at {form.max:g}", "overflow", limit=form.max)
    if math.isinf(error) and b.input_min < 0 <= a.input_min:
        return said(f"in {fmt} it takes values down to {b.input_min:.2g}, which are not negative in fp32", "negative")
    if math.isinf(error):
        return said(f"in {fmt} the result is not finite, where values below {form.flush_below:.2g} are 0", "nonfinite")
    flushed = float(((a.values != 0) & (a.values.abs() <= form.flush_below)).float().mean())
    if flushed > 0.5 * error and flushed > 0.1:
        text = f"{flushed:.0%} of them are below {form.flush_below:.2g} and become 0 in {fmt}"
        return said(text, "flushed", flushed=flushed)
    if not amax and bool(b.values.any()):
        return said(f"in {fmt} they are up to {_range([b.values])[0]:.2g}", "")
    if max(a.input_amax, amax) > form.max:
        return said(f"{fmt} ends at {form.max:g}, and the result is off by {percent(error)}", "overflow", error=error)
    exponent = math.frexp(max(a.input_amax, amax))[1] - 1
    ulp = 2.0 ** (max(exponent, form.emin) - form.precision)
    if centred:
        finite = a.values[a.values.isfinite()]
        low, high = float(finite.min()), float(finite.max())
        text = f"they lie between {low:.4g} and {high:.4g}, where an ulp of {fmt} is {ulp:.2g}: too coarse for them"
        return said(text, "", ulp=ulp)
    text = f"an ulp of {fmt} at {max(a.input_amax, amax):.4g} is {ulp:.2g}, and the result is off by {percent(error)}"
    return said(text, "cancellation" if amax and a.input_amax > 8 * amax else "", ulp=ulp, error=error)


def percent(share: float, of: str = "", *, digits: int = 0) -> str:
    """A share for a sentence: "12%" or "12% of its size", from ten times on "25 times" or "25 times its size"."""
    if share < 10:
        return f"{share:.{digits}%}" + (f" of {of}" if of else "")
    return f"{share:.3g} times" + (f" {of}" if of else "")


def _fix(op: str, kind: str) -> str:
    if kind == "flushed":
        return "a loss scale that lifts them (dynamic loss scaling)"
    for ops, when, text in _FIXES:
        if op in ops and (when == kind or (not when and kind != "negative")):
            return text
    return ""


def _aligned(exact: list[_Result], low: list[_Result]) -> list[tuple[_Result, _Result]]:
    """The ops that both ran, in order: casts differ between the two, ops do not."""
    matcher = difflib.SequenceMatcher(
        None, [(r.op, r.phase) for r in exact], [(r.op, r.phase) for r in low], autojunk=False
    )
    return [
        (exact[block.a + i], low[block.b + i])
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
        if exact[block.a + i].values.shape == low[block.b + i].values.shape
    ]


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error; for integers the share that differs. What is not finite in both counts as equal."""
    both = a.isfinite() & b.isfinite()
    size = float(torch.linalg.vector_norm(a[both])) if bool(both.any()) else 0.0
    error = float(torch.linalg.vector_norm((a - b)[both])) if bool(both.any()) else 0.0
    return error / size if size else float(error > 0)


def _centred_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Error relative to how far the values spread about their mean."""
    both = a.isfinite() & b.isfinite()
    if int(both.sum()) < 8:
        return 0.0
    spread = float(torch.linalg.vector_norm(a[both] - a[both].mean()))
    return float(torch.linalg.vector_norm((a - b)[both])) / spread if spread else 0.0


def _range(tensors: list[torch.Tensor]) -> tuple[float, bool, float]:
    """Largest finite magnitude, whether all is finite, smallest finite value."""
    amax, finite, least = 0.0, True, math.inf
    for x in tensors:
        if not x.numel():
            continue
        magnitude = x.detach().abs()
        good = magnitude.isfinite()
        finite = finite and bool(good.all())
        if bool(good.any()):
            amax = max(amax, float(magnitude[good].max()))
            least = min(least, float(x[good].min()))
    return amax, finite, least if math.isfinite(least) else 0.0


def _sampled(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // _MOST)].float()
