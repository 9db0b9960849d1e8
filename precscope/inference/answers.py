"""Whether the answer stays the same: the class or token with the largest logit, or the sign of a binary logit.

What a model's output means is not written on it, so this goes by evidence: integer targets in the batch that number the
classes of a dimension of the output, targets of 0 and 1 in the shape of the output, or an output called "logits". Where
there is none of these, agreement is not applicable, and said to be so. A caller who knows says `answer=`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .differences import named_tensors
from .result import Answer

ANSWERS = ("auto", "top-1", "sign", "none")


@dataclass(frozen=True)
class Rule:
    """How to read the answer. kind: "top-1", "tokens", "sign" or "none". output: which. dim: of the classes. target:
    name, in the batch, of targets below 0 that mark positions without an answer. why: in words."""

    kind: str
    output: str = ""
    dim: int = -1
    target: str = ""
    why: str = ""


def find_rule(outputs: Mapping[str, Tensor], batch: Any, arguments: Any, asked: str = "auto") -> Rule:
    """The rule for these floating `outputs`. arguments: what the model was called with. asked: one of ANSWERS.

    Raises UsageError for another word.
    """
    if asked not in ANSWERS:
        raise UsageError(f"answer must be one of {', '.join(ANSWERS)}, not {asked!r}")
    named = {name: t for name, t in outputs.items() if t.ndim}
    if asked == "none" or not named:
        return Rule("none", why="not asked for" if named else "the output holds no floating tensor")
    name = next((n for n in named if n.rpartition(".")[2] == "logits"), next(iter(named)))
    output = named[name]
    if asked == "sign":
        return Rule("sign", name, why="as asked")
    if asked == "top-1":
        return Rule(_word(output, -1), name, -1, why="over the last dimension, as asked")
    targets = _targets(batch, arguments)
    for target, tensor in targets.items():
        if (dim := _class_dim(output, tensor)) is not None:
            return Rule(_word(output, dim), name, dim, target, f"integer targets of shape {_text(tensor)} in the batch")
    for target, tensor in targets.items():
        if _is_binary(output, tensor):
            return Rule("sign", name, target=target, why=f"targets of 0 and 1 of shape {_text(tensor)} in the batch")
    if name.rpartition(".")[2] == "logits" and output.shape[-1] > 1:
        return Rule(_word(output, -1), name, -1, why=f"the output is called {name}")
    return Rule("none", why="no targets in the batch and no name say that the output is logits; answer= can say it")


class Agreement:
    """Counts the positions where two runs give the same answer."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.agreeing, self.count = rule, 0, 0

    def add(self, reference: Mapping[str, Tensor], tensors: Mapping[str, Tensor], batch: Any) -> None:
        """Take up one batch. Where either has NaN, or +inf among the logits of classes, there is no answer, and the
        position counts as one that does not agree."""
        rule = self.rule
        if rule.kind == "none":
            return
        r, y = reference[rule.output], tensors[rule.output]
        if rule.kind == "sign":
            same = ((r > 0) == (y > 0)) & ~(r.isnan() | y.isnan())
        else:
            same = (r.argmax(rule.dim) == y.argmax(rule.dim)) & _told(r, rule.dim) & _told(y, rule.dim)
            target = named_tensors(batch, "batch").get(rule.target)
            if target is not None and target.shape == same.shape:
                same = same[target.to(same.device) >= 0]
        self.agreeing += int(same.sum())
        self.count += same.numel()

    def result(self) -> Answer:
        """The share of positions that agree, None where the rule says "none" or there was no position."""
        share = self.agreeing / self.count if self.count else None
        return Answer(kind=self.rule.kind, agreement=share, count=self.count, why=self.rule.why)


def _told(logits: Tensor, dim: int) -> Tensor:
    """Where logits have a largest one: no NaN, no +inf (a mask of -inf is fine)."""
    return ~(logits.isnan() | logits.isposinf()).any(dim)


def _targets(batch: Any, arguments: Any) -> dict[str, Tensor]:
    """Tensors of the batch that may be targets: those that the model is not called with first, and of those that it is
    called with, all where there are two or more of one shape (a model that takes tokens and targets)."""
    tensors = named_tensors(batch, "batch")
    given = list(named_tensors(list(arguments[0]) + list(arguments[1].values())).values()) if arguments else []
    apart = {n: t for n, t in tensors.items() if not any(_alike(t, g) for g in given)}
    inputs = {n: t for n, t in tensors.items() if n not in apart and not t.is_floating_point()}
    if len(inputs) > 1:
        apart.update(list(inputs.items())[1:])
    return apart


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a.to(b.device), b)


def _class_dim(output: Tensor, target: Tensor) -> int | None:
    """The dimension of `output` whose indices `target` holds: all other dimensions are its shape."""
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool or not target.numel():
        return None
    for dim in (-1, 1):
        if output.ndim < 2 or output.ndim != target.ndim + 1 or output.shape[dim] < 2:
            continue
        others = [n for i, n in enumerate(output.shape) if i != dim % output.ndim]
        if others == list(target.shape) and int(target.max()) < output.shape[dim]:
            return dim
    return None


def _is_binary(output: Tensor, target: Tensor) -> bool:
    """Whether `target` holds 0 and 1 in the output's shape, and the output is not a probability."""
    if target.numel() != output.numel() or not target.numel() or target.squeeze().shape != output.squeeze().shape:
        return False
    values = target.double()
    binary = bool(((values == 0) | (values == 1)).all())
    return binary and bool((output < 0).any() or (output > 1).any())


def _word(output: Tensor, dim: int) -> str:
    return "tokens" if output.ndim == 3 and dim % output.ndim == 2 else "top-1"


def _text(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "()"
