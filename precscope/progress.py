"""Progress on the terminal: bars where there is one, a line now and then and at the end of each part where there is
none (a pipe, a log, a job of continuous integration): no colours, no carriage returns."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Context manager that shows what is going on, on standard error."""

    def __enter__(self) -> Progress:
        self._bars: Any = None
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = ("{task.description}", BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[loss]}"))  # fmt: skip
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, text: str) -> None:
        """Say that a part begins."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def run(self, name: str) -> Callable[[int, int, float], None]:
        """A callback (steps done, steps in all, last loss) for one training run called `name`."""
        if self._bars is not None:
            bar = self._bars.add_task(name, total=None, loss="")
            return lambda done, total, loss: self._bars.update(
                bar, completed=done, total=total, loss=f"loss {loss:.4f}"
            )
        return _Lines(name)


def is_terminal(stream: TextIO) -> bool:
    """Whether pictures can be redrawn on `stream`: not in a pipe, on a terminal that cannot move its cursor, or in a
    job of continuous integration (CI is set), whose log keeps every redrawing as a line."""
    quiet = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return stream.isatty() and not quiet and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


class _Lines:
    """A line now and then: at most one every ten seconds, and one at the end."""

    def __init__(self, name: str) -> None:
        self._name, self._next = name, time.monotonic() + 10

    def __call__(self, done: int, total: int, loss: float) -> None:
        if done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + 10
            print(f"{self._name}: step {done} of {total}, loss {loss:.4f}", file=sys.stderr, flush=True)
