"""The log of a training run: train.parquet, a row per optimizer step, and the trainer's part of run.json.

Rows wait on the device until `sync_every` of them are copied at once, then in memory until the file is written again:
after `flush_seconds`, or twenty times as long as the last write took, so that a long log costs at most a twentieth of
the time. Each write replaces the file whole, so a killed run leaves one that loads.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import RunDirectoryError, first_line
from ..store import SCHEMA, replacing, update_json

if TYPE_CHECKING:
    import pyarrow as pa


class Row(NamedTuple):
    """One optimizer step. step: from 0. loss: mean over its micro-batches. lr: of the first parameter group. scale: the
    loss scale, 1 where none. skipped: whether the optimizer was not stepped. nonfinite: whether the loss, or without a
    loss scale a gradient, was not finite. grad_norm: total 2-norm, unscaled, before clipping. time_ms: of the step.
    memory_bytes: allocated on the GPU, or resident in the process. eval_loss: NaN where not evaluated. phase: place of
    the precision in force in run.json's list "phases"."""

    step: int
    loss: float
    lr: float
    scale: float
    skipped: bool
    nonfinite: bool
    grad_norm: float
    time_ms: float
    memory_bytes: int
    eval_loss: float = float("nan")
    phase: int = 0


class TrainLog:
    """Rows of the run so far, and their file. out: the run directory, None to keep them in memory only."""

    def __init__(self, out: Path | None, *, flush_seconds: float) -> None:
        self.out, self.flush_seconds = out, flush_seconds
        self.rows: list[Row] = []
        self._written, self._next_write, self._warned = 0, time.monotonic() + flush_seconds, False

    def add(self, rows: list[Row]) -> None:
        """Append rows, and write the file where it is time to; a full disk is warned about once and ends nothing."""
        self.rows += rows
        if self.out is not None and time.monotonic() >= self._next_write:
            try:
                self.flush()
            except RunDirectoryError as error:
                self._next_write = time.monotonic() + 60.0
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"the training log waits in memory: {error}", RuntimeWarning, stacklevel=3)

    def evaluated(self, loss: float) -> None:
        """Note the held-out loss on the last row."""
        if self.rows:
            self.rows[-1] = self.rows[-1]._replace(eval_loss=loss)
            self._written = min(self._written, len(self.rows) - 1)

    def flush(self) -> None:
        """Write train.parquet with all rows. Raises RunDirectoryError where it cannot be written."""
        if self.out is None or self._written == len(self.rows):
            return
        import pyarrow.parquet as pq

        start = time.monotonic()
        with replacing(self.out / "train.parquet") as temporary:
            pq.write_table(_to_table(self.rows), temporary)
        self._written = len(self.rows)
        end = time.monotonic()
        self._next_write = end + max(self.flush_seconds, 20 * (end - start))

    def cut(self, step: int) -> None:
        """Drop the rows from `step` on: the run goes back to it."""
        self.rows = [row for row in self.rows if row.step < step]
        self._written = -1

    def load_before(self, step: int, out: Path | None) -> None:
        """Take over the rows before `step` from the file in `out` of an earlier part of this run, on processes that
        write none, too."""
        if out is not None and (out / "train.parquet").exists():
            self.rows = [row for row in read_log(out) if row.step < step]


def read_log(out: str | Path) -> list[Row]:
    """The rows of a run's train.parquet. Raises RunDirectoryError where there is none or it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(out) / "train.parquet"
    try:
        table = pq.read_table(path, partitioning=None)
        needed = [name for name in Row._fields if name != "phase" or name in table.column_names]  # older runs lack it
        return [Row(**row) for row in table.select(needed).to_pylist()]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({first_line(error):.120}): move it away to train anew"
        ) from error


def write_run_json(out: Path | None, content: dict[str, Any]) -> None:
    """Merge `content` into the run directory's run.json, keeping what a recorder has written there."""
    if out is not None:
        update_json(out / "run.json", {"schema": SCHEMA, **content})


def _to_table(rows: list[Row]) -> pa.Table:
    import pyarrow as pa

    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    hints = {"step": int, "memory_bytes": int, "phase": int, "skipped": bool, "nonfinite": bool}
    schema = pa.schema(
        [(name, kinds[hints.get(name, float)]) for name in Row._fields],
        metadata={b"precscope.schema": str(SCHEMA).encode(), b"precscope.kind": b"train"},
    )
    columns = [pa.array([getattr(row, f.name) for row in rows], f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


class StepClock:
    """Milliseconds per step: the host's clock on the CPU, events on a GPU, where the host runs ahead of the work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: list[Any] = []

    def start(self) -> None:
        """Begin a step."""
        self._begin = self._mark()

    def stop(self) -> None:
        """End it."""
        self._pending.append((self._begin, self._mark()))

    def read(self) -> list[float]:
        """Milliseconds of the steps since the last read, after the device was waited for."""
        pairs, self._pending = self._pending, []
        if self._cuda:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MemoryMeter:
    """Memory now and at its peak: PyTorch's allocator on a GPU, resident memory of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak, self._reset, self._last, self._looked = 0, False, 0, float("-inf")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            _release_free_memory()
            with suppress(OSError):  # resets the kernel's high-water mark of this process; needs Linux 4.0
                Path("/proc/self/clear_refs").write_text("5")
                self._reset = True

    def now(self) -> int:
        """Bytes in use. Waits for no device. On a CPU at most 50 times a second: asking the system takes 20 us."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        now = time.monotonic()
        if now - self._looked > 0.02:
            self._last, self._looked = _resident_bytes(), now
            self._peak = max(self._peak, self._last)
        return self._last

    def peak(self) -> int:
        """Most bytes in use since this object was made, as far as the system tells."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self._looked = float("-inf")
        self.now()
        if self._reset:
            lines = Path("/proc/self/status").read_text().splitlines()
            high_water = next((line for line in lines if line.startswith("VmHWM")), "VmHWM: 0 kB")
            return max(self._peak, int(high_water.split()[1]) * 1024)
        return self._peak


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def _release_free_memory() -> None:
    """Give freed heap pages back to the system (glibc), so that an earlier run does not count for this one."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
