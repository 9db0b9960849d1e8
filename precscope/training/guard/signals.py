"""What the log's rows tell: overflow, a loss scale that collapses, a spike. Plain Python, no tensor, cheap.

Robust by design, so that noisy healthy runs raise nothing: loss and gradient norm are compared with the median of the
last steps in units of the median absolute deviation (MAD; 1.4826 MAD is the standard deviation of a normal sample), the
norm on a log scale, and both must be beyond, for several steps. The first falls of a loss scale from 65536 are how it
finds its value and raise nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..log import Row
from .config import GuardConfig

_IN_A_ROW, _IN_A_ROW_AT_FIRST = 3, 12
_SPAN = 5  # steps within which a spike repeats
_LEAST = 32  # steps that the median needs beside which a step is a spike
_RECENT = 16  # steps beside which a step is a suspect
_SUSPECT_MADS, _SUSPECT_LOG2 = 4.0, 2.0
_STALE = 8  # steps for which medians are used again
_FIRST_WAIT, _LONGEST_WAIT = 50, 1600  # steps between two looks at nothing but a suspicion


@dataclass(frozen=True)
class Signal:
    """An alarm, cause unknown yet. kind: "overflow" (the loss, or without a loss scale the gradient, was not finite),
    "scale" (steps skipped for the loss scale, again and again), "spike" (loss and gradient norm blow up) or "suspect"
    (one of them is far from where it was: worth a look, no alarm yet). step: the one to look at. scale: its loss
    scale. first: the first step of this trouble. numbers: what raised it."""

    kind: str
    step: int
    scale: float
    first: int
    numbers: dict[str, float]


class Signals:
    """The state between readings. good: steps taken with finite figures, in all. good_scale: the loss scale of the last
    of them, 0 before the first. last_bad: last step that was not."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.good, self.good_scale, self.last_bad = 0, 0.0, -1
        self._bad_in_a_row, self._falls, self._told_falls, self._scale = 0, 0, 0, 0.0
        self._losses: deque[float] = deque(maxlen=config.history)
        self._norms: deque[float] = deque(maxlen=config.history)  # log2
        self._odd: deque[tuple[int, bool]] = deque(maxlen=_SPAN)  # steps that were beyond, and whether they spiked
        self._next_look, self._wait, self._scaled = 0, _FIRST_WAIT, False
        self._usual: _Usual | None = None
        self._recent: _Usual | None = None
        self._age = 0

    def see(self, row: Row, *, scaled: bool) -> Signal | None:
        """The alarm that this step raises, if any. scaled: whether the run has a loss scale."""
        if scaled != self._scaled:  # a phase with a loss scale begins, or ends
            self._scaled, self.good, self._falls, self._told_falls, self._scale = scaled, 0, 0, 0, 0.0
        if scaled:
            self._follow_scale(row)
        if row.nonfinite or (row.skipped and not math.isfinite(row.grad_norm)):
            self._bad_in_a_row += 1
            self.last_bad = row.step
            if not scaled or row.nonfinite:
                return Signal("overflow", row.step, row.scale, row.step - self._bad_in_a_row + 1, {"loss": row.loss})
            return self._of_scale(row)
        if row.skipped:
            return None  # left out on purpose: what it would have done does not count
        self._bad_in_a_row = 0
        self.good += 1
        self.good_scale = row.scale if scaled else self.good_scale
        return self._unusual(row)

    def _follow_scale(self, row: Row) -> None:
        before, self._scale = self._scale, row.scale
        if before <= 0 or row.scale == before:
            return
        steps = round(math.log2(before / row.scale))
        if self.good >= self.config.settle_steps or steps < 0:
            self._falls = max(0, self._falls + steps)
            self._told_falls = min(self._told_falls, self._falls)

    def _of_scale(self, row: Row) -> Signal | None:
        settled = self.good >= self.config.settle_steps
        first = row.step - self._bad_in_a_row + 1
        numbers = {"scale": row.scale, "falls": float(self._falls), "in_a_row": float(self._bad_in_a_row)}
        limit = _IN_A_ROW if settled else _IN_A_ROW_AT_FIRST
        long = self._bad_in_a_row >= limit and (self._bad_in_a_row - limit) % limit == 0
        fallen = self._falls >= self._told_falls + self.config.scale_falls
        if not (long or (settled and fallen)):
            return None
        if fallen:
            self._told_falls = self._falls
        return Signal("scale", row.step, row.scale, first, numbers)

    # spikes

    def _unusual(self, row: Row) -> Signal | None:
        """A spike; or something that is worth a look and no more: loss or norm alone far from where they just were."""
        if not (math.isfinite(row.grad_norm) and math.isfinite(row.loss)):
            return None
        norm = math.log2(row.grad_norm) if row.grad_norm > 0 else -1074.0
        odd, spike = self._beyond(row.loss, norm)
        if odd:
            self._odd.append((row.step, spike))
        recent = [was_spike for step, was_spike in self._odd if step > row.step - _SPAN]
        spiked = sum(recent) >= self.config.spike_repeats
        waiting = row.step < self._next_look
        if not odd or (waiting and not spike):
            self._losses.append(row.loss)
            self._norms.append(norm)
        if not odd or not (spiked or (len(recent) >= self.config.spike_repeats and not waiting)):
            return None
        usual = self._usual
        assert usual is not None
        numbers = {"loss": row.loss, "usual_loss": usual.loss, "norm": row.grad_norm, "usual_norm": 2.0**usual.norm}
        first = next(step for step, _ in self._odd if step > row.step - _SPAN)
        self.forget_history()
        if not spiked:
            self._next_look, self._wait = row.step + self._wait, min(2 * self._wait, _LONGEST_WAIT)
        return Signal("spike" if spiked else "suspect", row.step, row.scale, first, numbers)

    def _beyond(self, loss: float, norm: float) -> tuple[bool, bool]:
        """Whether loss or norm (log2) are odd beside the last few steps, and whether both are a spike beside many."""
        if len(self._norms) < _RECENT:
            return False, False
        if self._usual is None or self._age >= _STALE:
            self._usual, self._recent = _Usual.of(self._losses, self._norms, len(self._norms)), None
            self._recent, self._age = _Usual.of(self._losses, self._norms, _RECENT), 0
        self._age += 1
        usual, recent, mads = self._usual, self._recent, self.config.spike_mads
        assert recent is not None
        odd = loss - recent.loss > max(_SUSPECT_MADS * recent.loss_spread, 1e-3 * abs(recent.loss))
        odd |= abs(norm - recent.norm) > max(_SUSPECT_LOG2, _SUSPECT_MADS * recent.norm_spread)
        spike = loss - usual.loss > max(mads * usual.loss_spread, 1e-3 * abs(usual.loss))
        spike &= len(self._norms) >= _LEAST and norm - usual.norm > max(
            math.log2(self.config.spike_ratio), mads * usual.norm_spread
        )
        return odd or spike, spike

    def forget_history(self) -> None:
        """Learn anew what is usual."""
        self._losses.clear()
        self._norms.clear()
        self._odd.clear()
        self._usual, self._recent, self._age = None, None, 0

    # state

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "good": self.good, "good_scale": self.good_scale, "last_bad": self.last_bad, "scale": self._scale,
            "bad_in_a_row": self._bad_in_a_row, "falls": self._falls, "told_falls": self._told_falls,
            "losses": list(self._losses), "norms": list(self._norms), "odd": [list(odd) for odd in self._odd],
            "usual": [list(u) for u in (self._usual, self._recent) if u is not None], "age": self._age,
            "next_look": self._next_look, "wait": self._wait, "scaled": self._scaled,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.good, self.good_scale, self.last_bad = state["good"], state["good_scale"], state["last_bad"]
        self._scale, self._bad_in_a_row = state["scale"], state["bad_in_a_row"]
        self._falls, self._told_falls = state["falls"], state["told_falls"]
        self._losses = deque(state["losses"], maxlen=self.config.history)
        self._norms = deque(state["norms"], maxlen=self.config.history)
        self._odd = deque(((step, spike) for step, spike in state["odd"]), maxlen=_SPAN)
        self._next_look, self._wait, self._scaled = state["next_look"], state["wait"], state["scaled"]
        self._usual, self._recent = (_Usual(*u) for u in state["usual"]) if state["usual"] else (None, None)
        self._age = state["age"]


class _Usual(NamedTuple):
    """Medians of loss and log2 norm, and robust standard deviations (1.4826 MAD)."""

    loss: float
    loss_spread: float
    norm: float
    norm_spread: float

    @classmethod
    def of(cls, losses: deque[float], norms: deque[float], count: int) -> _Usual:
        """Of the last `count` steps."""
        return cls(*_robust(list(losses)[-count:]), *_robust(list(norms)[-count:]))


def _robust(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    return middle, 1.4826 * statistics.median(abs(v - middle) for v in values)
