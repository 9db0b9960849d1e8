"""Watching every op, forward and backward, for the first that makes non-finite values.

*Producer, not propagator*: an op counts whose inputs are finite and whose outputs are not, or that makes NaN out of
inf. -inf written on purpose (masked_fill, full, where with a scalar) is how masks are made: it counts only where it
becomes NaN or +inf. What the next op on it replaces (0/0, then masked_fill) does not count either, nor does a -inf that
ends in an integer or is replaced further on (T5's log of distance 0, then a cast to bucket numbers, then where). Memory
that nothing was written to (empty, empty_like) is not looked at, views are passed over.

The tracer only reads: outputs and gradients are equal bit for bit with and without it. It reads every output as soon as
it is there, one reduction each, so the host waits for the device at every op: a debugging tool, not for whole runs.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..attribution import Attribution, Where
from ..errors import UsageError
from .causes import Flush, Incident, explain
from .finding import Finding, TensorRange
from .ops import Call, call_of, float_format, is_float, is_mask, op_of
from .reading import NAN, NEG_INF, POS_INF, alone, nonfinite, read_range, scalars_in, tensors_in, widened

_NOT_HALF = "without overflow"  # of "value cannot be converted to type at::Half without overflow"


def trace(model: nn.Module, *, stop: bool = False, scale: float | None = None, keep: int = 8) -> Tracer:
    """Watch every op of what runs inside for the first that makes non-finite values.

        with ps.trace(model) as t:
            loss_of(model, batch).backward()
        print(t.first_nonfinite)

    model: names the ops' modules; ops outside it are watched too. stop: look at nothing more once something was found
    (the run goes on, faster). scale: the loss scale in use, so that an overflow in backward can be told from one by the
    scale. keep: findings to keep in `events`. Enter it innermost, after other dispatch modes, so that it sees the ops
    as the model calls them. Numbers are untouched; the host waits for the device at every op.
    Raises ModelError where `model` is no module.
    """
    return Tracer(model, stop=stop, scale=scale, keep=keep)


class Tracer:
    """`with ps.trace(model) as t:`; see `trace` for the arguments.

    events: the first `keep` findings, in order. raised: the first exception of an op, whatever it was. ops: how many
    ops ran.
    """

    def __init__(self, model: nn.Module, *, stop: bool = False, scale: float | None = None, keep: int = 8) -> None:
        self._who = Attribution(model, lines=True)
        self._stop, self._scale, self._keep = stop, scale, keep
        self._mode: _Mode | None = None
        self._reset()

    def _reset(self) -> None:
        self.events: list[Finding] = []
        self.raised: Finding | None = None
        self.ops = 0
        self._wrote_inf = False  # somebody wrote +inf on purpose
        self._flushed: deque[tuple[str, Flush]] = deque(maxlen=64)  # module, what became 0 in it
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], Finding]] = {}  # tensors that are in events
        self._makers: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self._known: dict[int, StorageWeakRef] = {}  # memory that was seen to become non-finite: not held beforehand

    @property
    def first_nonfinite(self) -> Finding | None:
        """The first finding; None where every value was finite, or non-finite on purpose."""
        return self.events[0] if self.events else None

    @property
    def last_module(self) -> str | None:
        """FQN of the module that ran last (of interest after an exception), "" for the root and for code outside every
        module, None where nothing ran."""
        return None if self._who.latest is None else self._who.latest.module

    def __enter__(self) -> Tracer:
        if self._mode is not None:
            raise UsageError("this tracer is entered already: call ps.trace(model) again for another one")
        self._reset()
        self._look_at_model()
        self._who.__enter__()
        self._mode = _Mode(self)
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._mode is not None
        mode, self._mode = self._mode, None
        try:
            mode.__exit__(kind, value, trace)
        finally:
            self._known.clear()
            self._who.__exit__(kind, value, trace)
            self._makers.clear()
            self._made.clear()

    # one op

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op that is being dispatched, and look at what it did."""
        self.ops += 1
        where = self._who.where()
        op = op_of(func)
        if op.passed_over or (self._stop and self.events and not op.repairs and not self._made_among(args)):
            out = func(*args, **kwargs)
            if op.name == "lift_fresh" and out.numel() == 1 and is_float(out) and nonfinite(out) & POS_INF:
                self._wrote_inf = True  # torch.tensor(float("inf"))
            return out
        call = call_of(func, op, where, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            self._note_raised(call, error)
            raise
        with alone():
            written = [args[n] for n in op.written if isinstance(n, int)] if out is None else out
            results = tensors_in(written)
            self._look(call, [x for x in results if is_float(x)])
            if results and op.name == "_to_copy" and not is_float(results[0]):
                self._drop(call, lambda x: nonfinite(x) == NEG_INF)
        return out

    def _look(self, call: Call, outputs: list[torch.Tensor]) -> None:
        """Judge the first output that is not finite, if any."""
        if not outputs:
            return
        if call.op.repairs and self._made and not nonfinite(outputs[0]):
            self._drop(call, lambda x: True)
        self._remember(call, outputs[0])
        self._note_flushed(call, outputs[0])
        for index, output in enumerate(outputs):
            if index and "attention" in call.op.name:
                return  # padding of a log-sum-exp
            found = nonfinite(output)
            if index and not call.op.name.startswith("_foreach_"):
                found &= NAN | POS_INF  # second outputs hold masks, too: a log-sum-exp for instance
            if found and call.op.name.startswith("_foreach_"):
                self._judge(call.nth(index, len(outputs)), output, 0, found)
            elif found:
                self._judge(call, output, index, found)
                return

    def _judge(self, call: Call, output: torch.Tensor, index: int, found: int) -> None:
        """Whether the op made its output so, or passed on what came in."""
        came = 0
        bad = []
        for x in call.inputs:
            flags = nonfinite(x)
            came |= flags
            if flags:
                bad.append(x)
        known = any(self._is_known(x) for x in bad)
        self._know(output)
        if is_mask(call, output, found, came):
            self._wrote_inf |= bool(found & POS_INF)
        elif came == 0 or (found & NAN and not came & NAN) or (came == NEG_INF and found & POS_INF):
            finding = self._add(self._finding, call, output, index)
            if finding is not None:
                self._made[id(output)] = (weakref.ref(output), finding)
        elif came & (NAN | POS_INF) and not self.events and not self._wrote_inf and not known:
            self._add(self._held, call, output)
        elif found == NEG_INF:  # passed on: it may still end in an integer, or be replaced
            for _, finding in self._made_of(bad):
                self._made[id(output)] = (weakref.ref(output), finding)

    def _drop(self, call: Call, ended: Callable[[torch.Tensor], bool]) -> None:
        """Forget the findings on those of the tensors that this op takes for which `ended` says so."""
        for x in [*call.inputs, *([call.target] if call.target is not None else [])]:
            for key, finding in self._made_of([x]):
                if ended(x):
                    self._made.pop(key, None)
                    self.events = [event for event in self.events if event is not finding]

    def _made_of(self, tensors: list[torch.Tensor]) -> list[tuple[int, Finding]]:
        """(key, finding) of those of the tensors that are in `events`."""
        found = [(id(x), x, self._made.get(id(x))) for x in tensors]
        return [(key, made[1]) for key, x, made in found if made is not None and made[0]() is x]

    def _made_among(self, args: tuple[Any, ...]) -> bool:
        return bool(self._made) and any(id(x) in self._made for x in tensors_in(list(args)))

    def _know(self, x: torch.Tensor) -> None:
        if len(self._known) > 4096:
            self._known.clear()
        if x.layout is torch.strided and type(x) in (torch.Tensor, nn.Parameter):
            storage = x.untyped_storage()
            self._known[storage._cdata] = StorageWeakRef(storage)  # keeps the address from being used again

    def _is_known(self, x: torch.Tensor) -> bool:
        if not self._known or x.layout is not torch.strided or type(x) not in (torch.Tensor, nn.Parameter):
            return False
        return x.untyped_storage()._cdata in self._known

    # what is found

    def _add(self, make: Callable[..., Finding], *arguments: Any) -> Finding | None:
        if len(self.events) >= self._keep:
            return None
        self.events.append(make(*arguments))
        return self.events[-1]

    def _finding(self, call: Call, output: torch.Tensor, index: int) -> Finding:
        wide = widened(call.func, call.args, call.kwargs)
        incident = Incident(
            op=call.op.name.removeprefix("_foreach_"),
            args=call.args,
            inputs=[x.detach() for x in call.inputs],
            ranges=tuple(read_range(x) for x in call.inputs),
            output=output.detach(),
            output_range=read_range(output),
            wide=wide[index] if wide is not None and index < len(wide) else None,
            format=float_format(output),
            flush=self._flush_near(call.where),
            node=call.where.node,
            loss_scale=self._scale if call.where.phase == "backward" else None,
            maker=self._maker_of(call.inputs),
        )
        kind, cause = explain(incident)
        return self._described(
            call, output, kind=kind, cause=cause, inputs=incident.ranges, outputs=(incident.output_range,),
            wide_amax=incident.wide_amax, loss_scale=incident.loss_scale,
        )  # fmt: skip

    def _held(self, call: Call, output: torch.Tensor) -> Finding:
        ranges = tuple(read_range(x) for x in call.inputs)
        worst = next(r for r in ranges if r.nan or r.pos_inf)
        cause = f"an input held {worst.losses}, and no op under the tracer made them: look at the batch first"
        return self._described(call, output, kind="held", cause=cause, inputs=ranges, outputs=(read_range(output),))

    def _described(self, call: Call, shown: torch.Tensor | None, **what: Any) -> Finding:
        """A Finding of this call; format and limit are those of `shown`."""
        where, module = call.where, call.where.module
        if not where.inside and not module and call.target is not None:
            module = self._who.owner(call.target) or ""  # the optimizer writes a parameter
        fmt = float_format(shown) if shown is not None else None
        limits: dict[str, Any] = {"format": fmt.name, "limit": fmt.max} if fmt is not None else {}
        return Finding(
            module=module, call=where.call, op=call.op.text, phase=where.phase, line=self._who.line(),
            node=where.node, inside=where.inside, recompute=where.recompute, **limits, **what,
        )  # fmt: skip

    def _note_raised(self, call: Call, error: Exception) -> None:
        """Keep what an op raised; it is a finding of its own where a constant had no place in the format."""
        if self.raised is not None:
            return
        message = " ".join(str(error).split())
        scalars = scalars_in(call.args, call.kwargs)
        shown = next(iter(call.inputs), None)
        with alone():
            ranges = tuple(read_range(x) for x in call.inputs)
        cause = f"{call.op.name} raised {type(error).__name__}: {message:.160}"
        finding = self._described(
            call, shown, kind="exception", cause=cause, inputs=ranges, error=f"{type(error).__name__}: {message:.300}"
        )
        if _NOT_HALF in message and scalars and finding.format:
            worst = max(scalars, key=abs)
            cause = f"{call.op.name}: the constant {worst:g} is beyond {finding.format}'s {finding.limit:.5g}"
            finding = replace(finding, cause=cause)
        self.raised = finding
        if _NOT_HALF in message:
            self._add(lambda: finding)

    def _look_at_model(self) -> None:
        """Parameters and buffers that are not finite to begin with (-inf is a mask)."""
        model = self._who.model
        with alone():
            for name, x in [*model.named_parameters(), *model.named_buffers()]:
                if is_float(x) and nonfinite(x) & (NAN | POS_INF):
                    self._add(_held_by_model, name, x)

    # what helps to explain

    def _note_flushed(self, call: Call, output: torch.Tensor) -> None:
        """Constants that the output's format cannot tell from 0: an eps that does nothing."""
        scalars = [s for s in scalars_in(call.args, call.kwargs) if s != 0]
        fmt = float_format(output) if scalars and not call.op.name.startswith(("mul", "div", "addc")) else None
        for scalar in scalars:
            if fmt is not None and abs(scalar) < fmt.flush_below:
                self._flushed.append((call.where.module, Flush(scalar, fmt.name, call.op.name)))

    def _flush_near(self, where: Where) -> Flush | None:
        """The last constant flushed in the same module."""
        return next((flush for module, flush in reversed(self._flushed) if module == where.module), None)

    def _remember(self, call: Call, output: torch.Tensor) -> None:
        if len(self._makers) > 256:
            self._makers.clear()
        place = f" in {call.where.module or 'the root'}" if call.where.inside else ""
        self._makers[id(output)] = (weakref.ref(output), f"{call.op.text}{place}")

    def _maker_of(self, inputs: list[torch.Tensor]) -> str:
        for x in inputs[:1]:
            ref, name = self._makers.get(id(x), (None, ""))
            if ref is not None and ref() is x:
                return name
        return ""


class _Mode(TorchDispatchMode):
    inside_emulation = True  # to be entered there: see Emulation

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.supports_higher_order_operators = True  # flex_attention: one op
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._tracer.run(func, args, kwargs or {})


def _held_by_model(name: str, x: torch.Tensor) -> Finding:
    found: TensorRange = read_range(x)
    kind = "parameter" if isinstance(x, nn.Parameter) else "buffer"
    fmt = float_format(x)
    assert fmt is not None
    cause = f"{kind} {name} held {found.losses} before anything ran"
    if fmt.max < 1e6 and not found.nan:
        cause += f": values beyond {fmt.name}'s {fmt.max:.5g} were cast to it"
    return Finding(
        module=name.rpartition(".")[0], call=0, op="", phase="forward", kind="held", cause=cause, outputs=(found,),
        format=fmt.name, limit=fmt.max,
    )  # fmt: skip
