"""The view on the terminal; plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ..formats import FloatFormat
from ..progress import is_terminal
from ..reporting.numbers import fixed, number, shorten
from .parts import Flushed, Parts
from .state import Course, in_time, sparkline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..training.log import Row

_DRAWN_EVERY = 0.12  # seconds between two pictures
_LINE_EVERY = 10.0  # seconds between two lines where there is no terminal
_WORST = 6


class LiveView:
    """Context manager that shows how one run goes on, on standard error.

    name: what runs ("train gpt"). out: its run directory, for what a recorder flushes there. format_of: module, step ->
    the format that it computes in then, whose end head-room is measured to; None: it is not said. assumed: whether
    that format is not the one in use. stream: default standard error. Drawn from within the calls of the trainer, by
    no other thread.
    """

    def __init__(
        self,
        name: str,
        *,
        out: str | Path | None = None,
        format_of: Callable[[str, int], FloatFormat | None] | None = None,
        assumed: bool = False,
        stream: TextIO | None = None,
        console: Console | None = None,
    ) -> None:
        self.name, self.course, self.worst = name, Course(), list[tuple[float, Any, float, str]]()
        self.recorded: tuple[int, ...] = ()
        self._parts = None if out is None or format_of is None else Parts(out)
        self._format_of, self._assumed = format_of, assumed
        self._stream, self._console = stream, console
        self._live: Any = None
        self._said, self._drawn = time.monotonic(), 0.0

    def __enter__(self) -> LiveView:
        console = self._console or _console(self._stream or sys.stderr)
        if console is not None:
            from rich.live import Live

            self._live = Live(self.picture(), console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._take()
            if self._live is not None:
                self._draw(force=True)
        finally:
            if self._live is not None:  # whatever happens: the cursor comes back
                self._live.stop()
        if self._live is None and self.worst:
            self._print(self._headline() + "".join(f"\n  {line}" for line in self._worst_lines(76)))

    def note(self, text: str) -> None:
        """Say that a part begins."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def read(self, rows: list[Row]) -> None:
        """The trainer has read the figures of these steps."""
        first = self.course.done == 0
        back = self.course.read(rows)
        if self._parts is not None and rows and (first or back):
            self._parts.begin(rows[0].step)

    def __call__(self, done: int, total: int, loss: float) -> None:
        """The callback that `ps.train` and `ps.profile` take as progress."""
        self.course.at(done, total, loss)
        if self._live is not None:
            self._draw(force=done == total)
        elif done == total or time.monotonic() - self._said >= _LINE_EVERY:
            self._said = time.monotonic()
            self._print(self.course.line(self.name))

    def picture(self) -> RenderableType:
        """What is drawn: text and one bar, no boxes."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        course = self.course
        width = self._width()
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True, overflow="ellipsis")
        top.add_column(ratio=1)
        top.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=max(course.total, 1), completed=course.done)
        steps = f"{course.done}/{course.total or '?'}"
        top.add_row(Text(shorten(_clean(self.name), 30), "bold"), bar, Text(f"step {steps}"))
        lines: list[RenderableType] = [top]
        if course.losses or course.loss == course.loss:
            said = Text("loss ", "dim").append(f"{course.loss:.4f}  ", "bold")
            lines.append(said.append(sparkline(course.losses, width - len(said.plain), plain=not self._unicode())))
        clock = [("elapsed", in_time(course.elapsed)), ("left", in_time(course.left))]
        lines.append(_pairs([*course.figures(), *clock]))
        if self.worst:
            lines.append(Text(self._headline(), "dim"))
            lines += [Text("  " + line) for line in self._worst_lines(width - 2)]
        return Group(*lines)

    # internals

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._drawn >= _DRAWN_EVERY:
            self._take()
            self._live.update(self.picture(), refresh=True)
            self._drawn = time.monotonic()

    def _take(self) -> None:
        """What was flushed since; before the first step, what lies there is of another run."""
        flushed: Flushed | None = self._parts.look() if self._parts is not None and self.course.done else None
        if flushed is not None and self._format_of is not None:
            of, last = self._format_of, flushed.steps[-1]
            self.worst, self.recorded = flushed.nearest(lambda module: of(module, last), _WORST), flushed.steps

    def _headline(self) -> str:
        steps = f"{self.recorded[0]} to {self.recorded[-1]}" if len(self.recorded) > 1 else f"{self.recorded[0]}"
        used = "were they in it" if self._assumed else "in use"
        return f"least head-room to the format {used}, steps {steps}:"

    def _worst_lines(self, width: int) -> list[str]:
        names = max(min(width - 34, 44), 8)
        return [
            f"{shorten(_clean(str(site)), names):<{names}} {number(reach):>9}  {fmt:<4} {fixed(room):>6} binades"
            for room, site, reach, fmt in self.worst
        ]

    def _width(self) -> int:
        return self._live.console.width if self._live is not None else (self._console.width if self._console else 80)

    def _unicode(self) -> bool:
        console = self._live.console if self._live is not None else self._console
        return console is None or "utf" in (console.encoding or "").lower()

    def _print(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)


def _console(stream: TextIO) -> Console | None:
    """A console to draw on; None where lines are printed: in a pipe, a log, a terminal that cannot move its cursor."""
    if not is_terminal(stream):
        return None
    from rich.console import Console

    return Console(file=stream)


def _pairs(pairs: list[tuple[str, str]]) -> Any:
    from rich.text import Text

    text = Text()
    for i, (what, value) in enumerate(pairs):
        text.append(" · " if i else "", "dim").append(f"{what} ", "dim").append(value)
    return text


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
