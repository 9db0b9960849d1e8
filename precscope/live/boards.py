"""Scalars and raw histograms for TensorBoard, through torch.utils.tensorboard (package `tensorboard`, optional).

    train/loss, lr, loss_scale, skipped, grad_norm, step_time_ms     a point per step
    log2_magnitude/<site>                                            a histogram per site and flush

A histogram's axis is log2 |x|: bucket [e, e + 1) counts the values with 2^e <= |x| < 2^(e+1), so that TensorBoard shows
binades side by side and what format they fit in. Counts are those of the recorder, added over the steps of one flush;
zeros, inf and NaN are not in them. The sums that TensorBoard keeps beside them are those of the middles of the buckets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunDirectoryError, UsageError, first_line
from ..histogram import BINADES
from ..sites import Site
from ..stats import StatsTable
from .parts import Parts

if TYPE_CHECKING:
    from ..training.log import Row

_MOST = 2000  # sites whose histograms are written: TensorBoard gets slow beyond
TAG = "log2_magnitude"


class Board:
    """Context manager that writes an event file into the directory `to` while a run goes on.

    out: the run directory, for the histograms that a recorder flushes there; None: scalars alone. most: sites at most,
    the first ones that were recorded. Pass it as `progress` to ps.train or ps.profile. Raises UsageError where
    tensorboard is missing, RunDirectoryError where `to` cannot be written when the first point is. A disk that fills up
    later does not end the run: the file ends there, a RuntimeWarning says so, and `failed` why.
    """

    def __init__(self, to: str | Path, *, out: str | Path | None = None, most: int = _MOST) -> None:
        self.to, self.most, self.left_out = Path(to), most, 0
        self._parts = None if out is None else Parts(out)
        self.failed = ""
        self._open: Any = None  # nothing is written before there is something to write
        self._make = writer_class()
        self._skipped, self._next, self._began = 0, 0, False
        self._sites: set[Site] = set()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, rows: list[Row]) -> None:
        """The trainer has read the figures of these steps: a point for each."""
        if not rows or self.failed:
            return
        if self._parts is not None and (self._next == 0 or rows[0].step < self._next):
            self._parts.begin(rows[0].step)
        self._next = rows[-1].step + 1
        with self._giving_up():
            for row in rows:
                self._skipped += row.skipped
                for tag, value in (
                    ("loss", row.loss), ("lr", row.lr), ("loss_scale", row.scale), ("skipped", self._skipped),
                    ("grad_norm", row.grad_norm), ("step_time_ms", row.time_ms),
                ):  # fmt: skip
                    self._writer.add_scalar(f"train/{tag}", value, row.step)

    def __call__(self, done: int, total: int, loss: float) -> None:
        """The callback that `ps.train` and `ps.profile` take as progress."""
        self._began = True
        self._take()

    def close(self) -> None:
        """Write what was flushed last, and end the file."""
        if self._began:  # else what lies there is of another run
            self._take()
        if self._open is not None and not self.failed:
            with self._giving_up():
                self._open.close()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """What is watched goes on where the file cannot be written any more."""
        try:
            yield
        except OSError as error:
            self.failed = f"{error.strerror or error}"
            warnings.warn(
                f"no more is written to the TensorBoard file in {self.to} ({self.failed}): free some space and train "
                "again, or choose another place; the run itself goes on",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def _writer(self) -> Any:
        if self._open is None:
            try:
                self.to.mkdir(parents=True, exist_ok=True)
                self._open = self._make(str(self.to))
            except OSError as error:
                raise RunDirectoryError(
                    f"cannot write to {self.to} ({error.strerror or error}): choose another place"
                ) from error
        return self._open

    def _take(self) -> None:
        flushed = None if self._parts is None or self.failed else self._parts.look()
        if flushed is None:
            return
        new = [s for s in flushed.sites if s not in self._sites]
        self._sites.update(new[: max(self.most - len(self._sites), 0)])
        self.left_out = max(self.left_out, len([s for s in flushed.sites if s not in self._sites]))
        with self._giving_up():
            for i, site in enumerate(flushed.sites):
                if site in self._sites:
                    for histogram in raw_histogram(flushed.table, i):
                        self._writer.add_histogram_raw(f"{TAG}/{site}", **histogram, global_step=flushed.steps[-1])


def raw_histogram(table: StatsTable, row: int) -> Iterator[dict[str, Any]]:
    """The arguments of add_histogram_raw for one row of a table; nothing where all its values are zero or not finite.

    The first bucket is empty and ends at the lowest binade: a bucket begins where the one before it ends.
    """
    filled = np.flatnonzero(table.counts[row])
    if not len(filled):
        return
    first, last = int(filled[0]), int(filled[-1])
    counts, edges = table.counts[row, first : last + 1].astype(float), BINADES[first : last + 1].astype(float)
    middles = edges + 0.5
    yield {
        "min": float(edges[0]), "max": float(edges[-1] + 1), "num": int(counts.sum()),
        "sum": float(counts @ middles), "sum_squares": float(counts @ middles**2),
        "bucket_limits": [edges[0], *(edges + 1)], "bucket_counts": [0.0, *counts],
    }  # fmt: skip


def writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"TensorBoard files need the package tensorboard ({first_line(error)}): pip install tensorboard"
        ) from error
    return SummaryWriter
