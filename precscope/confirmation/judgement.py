"""How far an outcome is from fp32's, in units of what is tolerated: above 1 fails.

Gradients are measured against their own size and against what they were over the recorded run: near a minimum a
gradient is small, its relative error large and harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .explanation import percent
from .probe import SAMPLE, Outcome, scattered
from .tolerance import Tolerance


@dataclass(frozen=True)
class Judgement:
    """score: the worst part in units of its tolerance. text: that part in words. numbers: all parts. visible: score of
    the worst part but for gradients: what shows in the loss and the output at once."""

    score: float
    text: str
    numbers: dict[str, float]
    visible: float = 0.0

    @property
    def passed(self) -> bool:
        return self.score <= 1.0


@dataclass(frozen=True)
class Yardstick:
    """loss_span: the largest loss of the run. gradients: parameter -> rms over the run of its gradient's norm."""

    tolerance: Tolerance
    loss_span: float = 0.0
    gradients: Mapping[str, float] | None = None

    def judge(self, reference: Outcome, outcome: Outcome, *, order: bool = True) -> Judgement:
        """Compare an outcome with fp32's on the same batch. order: also by the order of the output's values."""
        if outcome.error:
            return _failed(f"it raises {outcome.error}")
        if not outcome.finite or _spoilt(reference.outputs, outcome.outputs):
            return _failed(_nonfinite(reference, outcome))
        trained = bool(reference.gradients) or reference.loss == reference.loss
        if not trained and _size(reference) != _size(outcome):
            return _failed(
                f"the output has {_size(outcome)} values, in fp32 {_size(reference)}: give the task a forward= whose "
                "output has one shape, to compare more than that"
            )
        measure = self._loss if trained else self._output
        visible = [measure(reference, outcome), *([self._order(reference, outcome)] if order else [])]
        parts = [*visible, *(self._gradients(reference, outcome) if trained else ())]
        worst = max(parts, key=lambda p: p.score)
        numbers = {key: value for part in parts for key, value in part.numbers.items()}
        return Judgement(worst.score, worst.text, numbers, max(p.score for p in visible))

    def _loss(self, reference: Outcome, outcome: Outcome) -> Judgement:
        change = abs(outcome.loss - reference.loss)
        allowed = self.tolerance.loss * abs(reference.loss) + self.tolerance.span * max(self.loss_span, 1e-30)
        text = f"the loss becomes {outcome.loss:.4g}, in fp32 it is {reference.loss:.4g}"
        return Judgement(
            change / allowed if allowed else 0.0, text, {"loss": outcome.loss, "loss_fp32": reference.loss}
        )

    def _gradients(self, reference: Outcome, outcome: Outcome) -> list[Judgement]:
        known = {k: v for k, v in (self.gradients or {}).items() if v < float("inf")}
        sizes = {k: float(torch.linalg.vector_norm(g)) for k, g in reference.gradients.items()}
        usual2 = sum(known.get(k, 0.0) ** 2 for k in sizes)
        whole = sum(s**2 for s in sizes.values()) ** 0.5 + usual2**0.5
        error2, elements, harmed = 0.0, 0, 0
        worst, worst_error = "", 0.0
        for name, exact in reference.gradients.items():
            got = outcome.gradients.get(name)
            error = float(torch.linalg.vector_norm(exact if got is None else got - exact))
            relative = _share(error, sizes[name] + known.get(name, 0.0) or whole)  # one that is 0: against all
            error2 += error**2
            elements += exact.numel()
            if relative > self.tolerance.parameter:
                harmed += exact.numel()
            if relative > worst_error:
                worst, worst_error = name, relative
        if not elements:
            return []
        total = _share(error2**0.5, whole)
        share = harmed / elements
        return [
            Judgement(
                total / self.tolerance.gradient,
                f"parameter gradients are off by {percent(total, 'their size')}, those of {worst} by "
                f"{percent(worst_error)}",
                {"gradient_error": total, "worst_gradient_error": worst_error},
            ),
            Judgement(
                share / self.tolerance.elements,
                f"the gradients of {share:.0%} of the trained elements are off by more than "
                f"{self.tolerance.parameter:.0%}, those of {worst} by {percent(worst_error)}",
                {"elements_off": share},
            ),
        ]

    def _output(self, reference: Outcome, outcome: Outcome) -> Judgement:
        assert reference.outputs is not None and outcome.outputs is not None
        if reference.discrete:
            differ = float((outcome.outputs != reference.outputs).float().mean()) if _size(reference) else 0.0
            text = f"{differ:.1%} of the output's integers differ"
            return Judgement(differ / self.tolerance.output, text, {"output_error": differ})
        finite = reference.outputs.isfinite()  # -inf where a mask wrote it, and so in both
        size = float(torch.linalg.vector_norm(reference.outputs[finite]))
        error = float(torch.linalg.vector_norm((outcome.outputs - reference.outputs)[finite]))
        relative = _share(error, size)
        return Judgement(
            relative / self.tolerance.output,
            f"the output is off by {percent(relative, 'its size', digits=1)}",
            {"output_error": relative},
        )

    def _order(self, reference: Outcome, outcome: Outcome) -> Judgement:
        """Values of the output that were told apart in fp32 and are not any more: scores that saturate."""
        before, after = reference.outputs, outcome.outputs
        if before is None or after is None or reference.discrete or before.numel() < 8 or before.shape != after.shape:
            return Judgement(0.0, "", {})
        before, after = (scattered(v, SAMPLE) for v in (before, after))
        gap = before[:, None] - before[None, :]
        finite = before.isfinite()
        pairs = gap > 1e-6 * float(before[finite].abs().max()) if bool(finite.any()) else torch.zeros_like(gap).bool()
        count = int(pairs.sum())
        if not count:
            return Judgement(0.0, "", {})
        lost = int(((after[:, None] - after[None, :]) <= 0)[pairs].sum()) / count
        text = f"{lost:.0%} of the pairs of output values that differ in fp32 become equal or change places"
        return Judgement(lost / self.tolerance.order, text, {"order_lost": lost})


def _share(error: float, size: float) -> float:
    return error / size if size else float("inf") if error else 0.0


def _failed(text: str) -> Judgement:
    return Judgement(float("inf"), text, {}, float("inf"))


def _size(outcome: Outcome) -> int:
    return 0 if outcome.outputs is None else outcome.outputs.numel()


def _spoilt(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    """Whether values of the output are not finite that are in fp32: masks write -inf into both."""
    if before is None or after is None or before.shape != after.shape:
        return False
    return bool((before.isfinite() & ~after.isfinite()).any() | (before.isinf() & (after != before)).any())


def _nonfinite(reference: Outcome, outcome: Outcome) -> str:
    if outcome.loss - outcome.loss != 0 and reference.loss == reference.loss:
        return f"the loss becomes {outcome.loss}, in fp32 it is {reference.loss:.4g}"
    bad = [name for name, g in outcome.gradients.items() if not bool(g.isfinite().all())]
    if bad:
        return f"the gradient of {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} is not finite"
    return "the output is not finite"
