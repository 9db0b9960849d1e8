"""Whatever watches one run, as one callback: bars or lines, the live view, the TensorBoard writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats import FloatFormat, get_format
from ..progress import Progress
from .boards import Board
from .terminal import LiveView

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from ..training.log import Row


@dataclass(frozen=True)
class Watch:
    """callback: what `ps.train` and `ps.profile` take as progress. note: shows a line of text. board: where TensorBoard
    files go, None where none are written."""

    callback: Callable[[int, int, float], None]
    note: Callable[[str], None]
    board: Board | None = None


@contextmanager
def watching(
    name: str,
    *,
    out: str | Path | None = None,
    live: bool = False,
    tensorboard: str | Path | None = None,
    precision: str | None = None,
    plan: PrecisionPlan | str | Path | None = None,
) -> Iterator[Watch]:
    """Watch the run `name` whose directory is `out`.

    live: the live view instead of a bar. tensorboard: directory for a TensorBoard file. precision, plan: what the run
    computes in, for the head-room that the view shows; in fp32 it is that to fp16. Raises UsageError, PlanError and
    RunDirectoryError, as Board and PrecisionPlan.load.
    """
    with ExitStack() as stack:
        board = stack.enter_context(Board(tensorboard, out=out)) if tensorboard is not None else None
        if live:
            format_of, assumed = formats_of(precision, plan)
            shown: Any = stack.enter_context(LiveView(name, out=out, format_of=format_of, assumed=assumed))
            callback = shown
        else:
            shown = stack.enter_context(Progress())
            callback = shown.run(name)
        yield Watch(_Several([callback, board]) if board is not None else callback, shown.note, board)


class _Several:
    """Callbacks as one."""

    def __init__(self, callbacks: list[Any]) -> None:
        self._callbacks = callbacks

    def read(self, rows: list[Row]) -> None:
        for callback in self._callbacks:
            if hasattr(callback, "read"):
                callback.read(rows)

    def __call__(self, done: int, total: int, loss: float) -> None:
        for callback in self._callbacks:
            callback(done, total, loss)


def formats_of(
    precision: str | None, plan: PrecisionPlan | str | Path | None
) -> tuple[Callable[[str, int], FloatFormat | None], bool]:
    """(module, step -> format whose end counts, whether that is not the one in use): None for modules in fp32, unless
    the run is: then fp16's. A plan with phases: what is in force at that step."""
    if plan is not None:
        from ..plans import PrecisionPlan

        chosen = plan if isinstance(plan, PrecisionPlan) else PrecisionPlan.load(plan)
        in_force = lru_cache(maxsize=8)(chosen.at_step)
        return lambda module, step: _low(in_force(step)[module].compute), False
    fmt = _low(precision or "fp32")
    half = get_format("fp16")
    return lambda module, step: fmt or half, fmt is None


def _low(name: str) -> FloatFormat | None:
    fmt = get_format(name)
    return fmt if fmt.bits <= 16 else None
