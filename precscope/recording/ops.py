"""Op-level recording: the result of every aten op, forward and backward, with the module that ran it.

    with record_ops(model) as ops:
        loss = loss_of(model, batch)
        loss.backward()
    sites, table = ops.table()
    ops.ask("fp16").sort_values("overflow_hi")             # attention logits, sums of squares, masks: by name

What modules hide becomes visible: everything that is materialised between two ops. A fused kernel (attention by
scaled_dot_product_attention, LayerNorm) is judged by what it materialises: its logits or its squares never exist in
memory, in float32 inside the kernel they cannot overflow, and they are not recorded; the same attention written out as
matmul and softmax shows them.

Each result is reduced once, where it lies; nothing waits for the device before `table`. Views, copies and zeros made
anew are skipped, and so are integers, booleans, complex and meta tensors. What activation checkpointing recomputes is
not counted twice. The optimizer's step is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..attribution import Attribution, Where
from ..emulation.facts import Op, OpFacts, facts_of
from ..errors import UsageError
from ..kernels import SlotBuffer
from ..opstore import OpRecords, OpSite, at_step, concat, write_ops
from ..stats import StatsTable
from .observations import unscaled
from .tensors import dense

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SMALL_FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_FORGET_FROM = 1 << 16  # entries of tensors met


class _Rows:
    """Slots of the recorded ops on one device, and which results feed them.

    inputs[i]: rows whose results were arguments of row i.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # made inside inference mode, it could not be used outside
            self.buffer = SlotBuffer(device, capacity=1024)
        self.sites: list[OpSite] = []
        self.numbers: dict[OpSite, int] = {}
        self.inputs: list[set[int]] = []

    def number(self, site: OpSite) -> int:
        found = self.numbers.get(site)
        if found is None:
            found = self.numbers[site] = len(self.sites)
            self.sites.append(site)
            self.inputs.append(set())
            if found >= self.buffer.capacity:
                with torch.inference_mode(False):
                    self.buffer.grow(2 * self.buffer.capacity)
        return found

    def records(self, scale: float) -> OpRecords:
        """What the rows hold, the loss scale divided out of backward; one copy from the device."""
        n = len(self.sites)
        table = self.buffer.read(n)
        scales = np.asarray([scale if site.phase == "backward" else 1.0 for site in self.sites])
        table = unscaled(table, scales)
        amax = np.asarray([max((table.amax[i] for i in inputs), default=np.nan) for inputs in self.inputs])
        return OpRecords(self.sites, table, amax, scales, np.zeros(n, np.int64))


class OpRecorder(TorchDispatchMode):
    """Reduces what ops make; see the module's docstring and `record_ops`."""

    inside_emulation = True  # to be entered there: see Emulation

    def __init__(self, model: nn.Module, *, loss_scale: float | Tensor | None = None) -> None:
        super().__init__()
        self.supports_higher_order_operators = True  # flex_attention: one op, judged by what it returns
        self._who = Attribution(model)
        self.loss_scale = loss_scale
        self.paused = False
        self._rows: dict[torch.device, _Rows] = {}
        self._counts: dict[tuple[str, int, str, str], int] = {}
        self._pass = 0
        # (memory, offset, size) of a result -> (reference that keeps the address from being used again, version, row)
        self._met: dict[tuple[Any, ...], tuple[StorageWeakRef, int, int]] = {}
        self._stack = contextlib.ExitStack()
        self._entered = False

    # life cycle

    def __enter__(self) -> OpRecorder:
        if self._entered:
            raise UsageError("this op recorder is entered already: call record_ops(model) again for another one")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._who)
            handles = (
                register_optimizer_step_pre_hook(lambda *_: self._pause(True)),
                register_optimizer_step_post_hook(lambda *_: self._pause(False)),
            )
            for handle in handles:
                stack.callback(handle.remove)
            super().__enter__()
            self._stack = stack.pop_all()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        super().__exit__(kind, value, trace)
        self._stack.close()
        self._met.clear()
        self.paused = False

    def _pause(self, paused: bool) -> None:
        self.paused = paused

    # results

    def records(self) -> OpRecords:
        """What was recorded so far. Waits for the device: one copy per device."""
        scale = 1.0 if self.loss_scale is None else float(self.loss_scale)
        if not (np.isfinite(scale) and scale > 0):
            raise UsageError(f"loss_scale must be finite and above 0, got {scale}")
        return concat([rows.records(scale) for rows in self._rows.values()]).merged()

    def table(self) -> tuple[list[OpSite], StatsTable]:
        """Sites and their statistics, in the order in which the ops first ran."""
        records = self.records()
        return records.sites, records.table

    def ask(self, format: str, *, scale_exponent: int = 0) -> Any:
        """What a format would do to the result of every op: see OpRecords.ask."""
        return self.records().ask(format, scale_exponent=scale_exponent)

    def write(self, run_dir: str | Path, *, step: int = 0) -> Path:
        """Write what was recorded as the next ops-NNNNNN.parquet of a run directory. Raises RunDirectoryError."""
        return write_ops(run_dir, at_step(self.records(), step))

    def clear(self) -> None:
        """Forget what was recorded."""
        self._rows.clear()
        self._met.clear()
        self._counts.clear()

    # one op

    def __torch_dispatch__(self, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        where = self._who.where()
        facts = facts_of(func)
        if facts.view or facts.unfilled or self.paused:
            return result
        if facts.copies and type(result) is Tensor and isinstance(args[0], Tensor) and result.dtype == args[0].dtype:
            self._copied(args[0], result)
        elif not where.recompute:
            self._record(facts, where, args, result)
        return result

    def _record(self, facts: OpFacts, where: Where, args: Any, result: Any) -> None:
        first = None
        for position, x in enumerate(_results(facts, args, result)):
            values = dense(x) if isinstance(x, Tensor) else None
            if values is None or not values.numel():
                continue
            plain = values.layout is torch.strided and x.layout is torch.strided
            if plain and not facts.written and self._row_of(x) is not None:
                continue  # it lies in memory that was reduced: nothing new
            if first is None:
                first = self._index(where, facts.name)
            rows = self._rows_on(values.device)
            dtype = _NAMES.get(values.dtype) or _SMALL_FORMATS.get(str(values.dtype).removeprefix("torch."), "fp8")
            row = rows.number(OpSite(where.module, where.phase, facts.label(position), first, dtype))
            rows.buffer.accumulate(row, values)
            if position == 0:
                inputs = rows.inputs[row]
                for argument in args:
                    self._note_inputs(argument, inputs, row)
            if plain:
                self._meet(x, row, written=bool(facts.written))

    def _index(self, where: Where, op: str) -> int:
        """The how-manieth op of that name in this call of the module."""
        if self._who.passes != self._pass:
            self._pass = self._who.passes
            self._counts.clear()
        key = (where.module, where.call, where.phase, op)
        number = self._counts.get(key, 0)
        self._counts[key] = number + 1
        return number

    def _rows_on(self, device: torch.device) -> _Rows:
        found = self._rows.get(device)
        if found is None:
            found = self._rows[device] = _Rows(device)
        return found

    # tensors met before

    def _row_of(self, x: Tensor) -> int | None:
        """The row of these very numbers, seen through whatever view of the same size; None where they are not known."""
        found = self._met.get((x.untyped_storage()._cdata, x.storage_offset(), x.numel()))
        return found[2] if found is not None and found[1] == _version(x) else None

    def _meet(self, x: Tensor, row: int, *, written: bool) -> None:
        storage = x.untyped_storage()
        if len(self._met) >= _FORGET_FROM:
            self._met.clear()
        version = _version(x)
        if written and version >= 0:
            version += 1  # autograd counts the write once this op has returned
        self._met[storage._cdata, x.storage_offset(), x.numel()] = (StorageWeakRef(storage), version, row)

    def _copied(self, x: Tensor, copy: Tensor) -> None:
        """A copy has the numbers, and so the row, of what it copies."""
        if _has_memory(x) and _has_memory(copy) and x.numel() == copy.numel() and x.dtype == copy.dtype:
            row = self._row_of(x)
            if row is not None and x.device == copy.device:
                self._meet(copy, row, written=False)

    def _note_inputs(self, argument: Any, inputs: set[int], row: int) -> None:
        if isinstance(argument, Tensor):
            if argument.dtype in _NAMES and _has_memory(argument):
                found = self._row_of(argument)
                if found is not None and found != row:
                    inputs.add(found)
        elif isinstance(argument, list | tuple):
            for item in argument:
                if isinstance(item, Tensor):
                    self._note_inputs(item, inputs, row)


def record_ops(model: nn.Module, *, loss_scale: float | Tensor | None = None) -> OpRecorder:
    """A context manager that records every op of `model`, and of what runs around it, while it is entered.

    loss_scale: by which the loss is multiplied before backward; divided out of the rows of phase "backward" (exact for
    powers of two). It may be set later, as `ops.loss_scale`; a tensor is read when the table is.

    Losses, gradients and weights are the same bit for bit with and without it; compiled code runs eagerly inside.
    To record a run that is emulated, enter it inside `emulate`. Raises ModelError where `model` is no module.
    """
    return OpRecorder(model, loss_scale=loss_scale)


def _results(facts: OpFacts, args: Any, result: Any) -> Iterator[Any]:
    if isinstance(result, tuple | list):
        yield from result
    elif result is None and facts.written:  # _foreach_add_ and the like return nothing
        for place in facts.written:
            value = args[place] if isinstance(place, int) and place < len(args) else None
            yield from value if isinstance(value, list | tuple) else (value,)
    else:
        yield result


def _has_memory(x: Tensor) -> bool:
    return x.layout is torch.strided and x.device.type != "meta" and type(x) in (Tensor, nn.Parameter)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
