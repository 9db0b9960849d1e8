"""What a run has come to so far, from the figures that the trainer reads. No torch."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..reporting.numbers import figure, number, plural, power_of_two

if TYPE_CHECKING:
    from ..training.log import Row

_KEPT = 2000  # losses that are kept for the sparkline; of more, neighbours become one
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.-=*#"


class Course:
    """done, total: steps. loss, scale, grad_norm, lr, step_ms: of the last one read, NaN where not known. skipped,
    nonfinite: so far. losses: for a sparkline. clock: seconds, monotonic."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.done, self.total = 0, 0
        self.loss = self.grad_norm = self.lr = self.step_ms = float("nan")
        self.scale = 1.0
        self.skipped, self.nonfinite = 0, 0
        self.losses: list[float] = []
        self._every, self._sum, self._summed = 1, 0.0, 0
        self._clock, self.began = clock, clock()
        self._pace: deque[tuple[float, int]] = deque(maxlen=64)

    def read(self, rows: Sequence[Row]) -> bool:
        """Take in what the trainer has read; whether the run went back to an earlier step for it."""
        back = bool(rows) and self.done > rows[0].step
        for row in rows:
            self.skipped += row.skipped
            self.nonfinite += row.nonfinite
            self._add_loss(row.loss)
        if rows:
            last = rows[-1]
            self.scale, self.grad_norm, self.lr, self.step_ms = last.scale, last.grad_norm, last.lr, last.time_ms
        if back:
            self._pace.clear()
        return back

    def at(self, done: int, total: int, loss: float) -> None:
        """So many steps are done, the last with this loss."""
        self.done, self.total, self.loss = done, total, loss
        self._pace.append((self._clock(), done))

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self.began

    @property
    def left(self) -> float:
        """Seconds to go at the pace of the last readings, NaN where there is none yet."""
        if self.total and self.done >= self.total:
            return 0.0
        if len(self._pace) < 2:
            return float("nan")
        (then, first), (now, last) = self._pace[0], self._pace[-1]
        return (self.total - self.done) * (now - then) / (last - first) if last > first else float("nan")

    def line(self, name: str) -> str:
        """The state in one line of plain text."""
        said = [f"{name}: step {self.done} of {self.total}"]
        if self.loss == self.loss:
            said.append(f"loss {self.loss:.4f}")
        if self.scale != 1:
            said.append(f"scale {power_of_two(self.scale)}")
        said += [f"{self.skipped} skipped"] if self.skipped else []
        said += [plural(self.nonfinite, "step") + " not finite"] if self.nonfinite else []
        said += [f"{in_time(self.left)} left"] if 0 < self.left < math.inf else []
        return ", ".join(said)

    def figures(self) -> list[tuple[str, str]]:
        """(what, figure) of what there is to say beside the loss."""
        found = []
        if self.lr == self.lr:
            found += [("lr", number(self.lr)), ("gradient norm", number(self.grad_norm))]
        if self.scale != 1:
            found.append(("loss scale", power_of_two(self.scale)))
        found += [("skipped", str(self.skipped)), ("not finite", str(self.nonfinite))]
        if self.step_ms == self.step_ms:
            found.append(("ms per step", figure(self.step_ms)))
        return found

    def _add_loss(self, loss: float) -> None:
        self._sum, self._summed = self._sum + loss, self._summed + 1
        if self._summed == self._every:
            self.losses.append(self._sum / self._every)
            self._sum, self._summed = 0.0, 0
        if len(self.losses) >= _KEPT:
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=False)]
            self._every *= 2


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """Values as a row of bars, at most `width`: each is the mean of its neighbours; "!" where one is not finite. plain:
    in ASCII."""
    if not values or width < 1:
        return ""
    bars, n = (_PLAIN if plain else _BARS), min(width, len(values))
    means = []
    for i in range(n):
        part = values[i * len(values) // n : (i + 1) * len(values) // n]
        means.append(sum(part) / len(part))
    finite = [m for m in means if math.isfinite(m)]
    lo, hi = (min(finite), max(finite)) if finite else (0.0, 0.0)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "!"
        return bars[round((value - lo) / (hi - lo) * (len(bars) - 1))] if hi > lo else bars[0]

    return "".join(map(bar, means))


def in_time(seconds: float) -> str:
    """ "1:02:03", "2:03" or "0:03"; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
