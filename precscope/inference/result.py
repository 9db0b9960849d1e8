"""What ps.infer returns: values, a table of at most 80 columns, and the content of infer.json."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

from ..reporting.numbers import bytes_text, figure, fixed, number, percent, plural, shorten
from ..reporting.text import columns, line_width

SCHEMA = 1
_WIDTH = 80  # at most; less on a narrower terminal


@dataclass(frozen=True)
class OutputDifference:
    """One output tensor, over all batches. shape: in the first batch. dtype: in low precision. relative_l2, max_abs,
    sqnr_db: see differences.py (inf dB: no error; NaN: no element is finite in both). equal: share of elements that are
    equal, bit for bit up to the sign of zero once both are wide. nonfinite, nonfinite_reference: inf and NaN elements
    in low precision and in fp32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    relative_l2: float
    max_abs: float
    sqnr_db: float
    equal: float
    nonfinite: int
    nonfinite_reference: int


@dataclass(frozen=True)
class Answer:
    """kind: "top-1", "tokens", "sign", or "none" where agreement is not applicable. agreement: share of the `count`
    positions with the same answer as in fp32, None where there is none. why: how that was found out."""

    kind: str
    agreement: float | None
    count: int
    why: str

    def __str__(self) -> str:
        if self.agreement is None:
            return f"answer: not applicable ({self.why})"
        what = {"top-1": "the same class", "tokens": "the same token", "sign": "the same sign"}[self.kind]
        return f"answer: {what} at {self._share()} of {self.count:,} positions ({self.why})"

    def _share(self) -> str:
        """100% means all of them."""
        assert self.agreement is not None
        shown = percent(self.agreement)
        if shown == "100" and self.agreement < 1:
            return f"all but {round(self.count * (1 - self.agreement)):,}"
        return f"{shown}%"


@dataclass(frozen=True)
class Latency:
    """Milliseconds per batch, medians over `pairs` runs in turns. ratio: of fp32's to the plan's within each pair,
    median; ratio_low, ratio_high: its quartiles. NaN where nothing was timed."""

    reference_ms: float
    ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: parameters and buffers as stored. working: what one run takes beyond them at its peak (see
    measuring.working_bytes)."""

    weights_reference: int
    weights: int
    working_reference: int
    working: int


@dataclass(frozen=True)
class Loss:
    """Means over the batches."""

    reference: float
    value: float

    @property
    def change(self) -> float:
        """Relative to fp32's."""
        return self.value / self.reference - 1 if self.reference else math.nan


@dataclass(frozen=True)
class InferResult:
    """A plan, or one precision, beside fp32 on the same batches.

    task: its name. precision: "plan", "bf16", ... modules: modules per compute format, where it is a plan. batches:
    how many, held_out: whether from eval_batches. device: "cpu", "cuda". outputs: a row per floating output. answer,
    latency, memory: see there. loss: None where the task's loss cannot be run without gradients. step: of the
    checkpoint that gave the weights, None where the task's own were used. call: how the model was called. notes: what
    else to know, in words. kept: (fp32's, the plan's) output of the first batches, as the model returned them.
    """

    task: str
    precision: str
    modules: dict[str, int]
    batches: int
    held_out: bool
    device: str
    outputs: tuple[OutputDifference, ...]
    answer: Answer
    loss: Loss | None
    latency: Latency
    memory: Memory
    step: int | None
    call: str
    notes: tuple[str, ...]
    kept: tuple[tuple[Any, Any], ...] = field(default=(), repr=False, compare=False)
    about: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def relative_l2(self) -> float:
        """The largest relative error of an output; NaN where there is no floating output, or one of them has none."""
        found = [o.relative_l2 for o in self.outputs]
        return math.nan if any(map(math.isnan, found)) else max(found, default=math.nan)

    @property
    def nonfinite(self) -> int:
        """inf and NaN elements of the outputs in low precision."""
        return sum(o.nonfinite for o in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """The content of infer.json: all but the kept outputs; `about` (versions, seed, plan) at its end."""
        plain = dataclasses.replace(self, kept=(), about={})
        content = {k: v for k, v in dataclasses.asdict(plain).items() if k not in ("kept", "about")}
        return {"schema": SCHEMA, "kind": "inference", **content, **self.about}

    def __str__(self) -> str:
        count = f"{self.batches} {'held-out' if self.held_out else 'training'} batch{'es' if self.batches > 1 else ''}"
        step = "" if self.step is None else f", weights of step {self.step}"
        modules = ", ".join(f"{n} in {fmt}" for fmt, n in self.modules.items())
        what = f"{self.precision} ({modules})" if modules else self.precision
        title = f"{self.task}: {what} beside fp32, {count} on {self.device}{step}"
        notes = [str(self.answer), *self._trouble(), *self._timing(), *self.notes]
        return "\n".join([*_wrapped([title]), *self._quantities(), "", *self._outputs(), *_wrapped(notes)])

    def _quantities(self) -> list[str]:
        m, t = self.memory, self.latency
        rows = [
            ("weights", bytes_text(m.weights_reference), bytes_text(m.weights), _part(m.weights, m.weights_reference)),
            (
                "working memory", bytes_text(m.working_reference), bytes_text(m.working),
                _part(m.working, m.working_reference),
            ),
        ]  # fmt: skip
        if t.pairs:
            rows.insert(0, ("ms per batch", figure(t.reference_ms), figure(t.ms), _speed(t.ratio)))
        if self.loss is not None:
            change = f"{100 * self.loss.change:+.3f}%" if math.isfinite(self.loss.change) else ""
            rows.insert(0, ("loss", figure(self.loss.reference), figure(self.loss.value), change))
        return columns(("", "fp32", self.precision, "change"), rows, width=_width())

    def _timing(self) -> list[str]:
        t = self.latency
        if not t.pairs:
            return []
        spread = f", half of them between {_speed(t.ratio_low)} and {_speed(t.ratio_high)}" if t.pairs > 1 else ""
        return [f"time: medians of {plural(t.pairs, 'pair')} of runs in turns{spread}"]

    def _outputs(self) -> list[str]:
        head = ("output", "shape", "relative error", "SQNR dB", "largest", "inf, NaN")
        rows = [
            (
                shorten(o.name, 20), " x ".join(map(str, o.shape)), number(o.relative_l2), fixed(o.sqnr_db),
                number(o.max_abs), str(o.nonfinite),
            )
            for o in self.outputs
        ]  # fmt: skip
        return columns(head, rows, left=(0, 1), width=_width()) if rows else ["no floating output to compare"]

    def _trouble(self) -> list[str]:
        found = []
        for o in self.outputs:
            if o.nonfinite > o.nonfinite_reference:
                found.append(
                    f"output {o.name}: {o.nonfinite:,} of {o.count:,} values are inf or NaN in {self.precision} and "
                    f"{o.nonfinite_reference:,} in fp32; the error is that of the finite ones, if there are any"
                )
            elif o.nonfinite_reference:
                found.append(f"output {o.name}: {o.nonfinite_reference:,} of {o.count:,} values are inf or NaN in fp32")
        return found


def _part(bytes_: int, of: int) -> str:
    return f"{bytes_ / of:.2f}x" if of else ""


def _speed(ratio: float) -> str:
    """Of fp32's time to the other's: "1.52x faster", "2.00x slower"."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _width() -> int:
    return line_width(most=_WIDTH)


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, _width(), subsequent_indent="  ")]
