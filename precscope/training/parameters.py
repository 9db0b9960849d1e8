"""Training parameters that are stored in bf16 or fp16: what keeps their small updates from being rounded away.

A bf16 weight near 1 changes by 1/128 or not at all; an update of 1e-5 is rounded away, at every step (a *swallowed*
update). `LowPrecisionOptimizer` lets any torch optimizer work in fp32, on stand-ins for the low parameters, and writes
what comes out back in one of four ways:

    updates       beside the parameter         what it does
    "nearest"     nothing                      rounds to nearest: small updates are lost
    "stochastic"  nothing                      rounds up or down at random, right on average (narrowing.py)
    "kahan"       2 bytes: what was cut off    adds it again at the next step (Zamirai et al., arXiv:2010.06192)
    "master"      4 bytes: fp32 weights        parameters are the rounding of fp32 master weights (Micikevicius et al.,
                                               arXiv:1710.03740)

What "kahan" keeps of a bf16 parameter are the lower 16 bits of the fp32 value, as an integer: both together are that
value, to an ulp of fp32, so that bf16 parameters train as on master weights for 2 bytes less. (Of fp16, whose exponents
are fewer, it keeps the difference in bf16: 19 significant bits in all.)

Stand-ins other than master weights exist a piece of the model at a time. Parameters in fp32 are their own stand-ins, so
that nothing changes for them. State may be stored in fewer bits between steps, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .config import UPDATES
from .narrowing import check_state, cut_off, put_together, restore_state, round_together, store_state
from .shards import copied, local, moved, size, values, wrapped

LOW = (torch.bfloat16, torch.float16)
_PIECE = {"cpu": 1 << 18}  # elements of stand-ins that exist at once: on the CPU what stays in its cache
_LARGE_PIECE = 1 << 24  # elsewhere
_OURS = ("master", "compensation")
_WHOLE = ("Adafactor", "Muon")  # whose updates depend on more of a tensor than a shard holds


class LowPrecisionOptimizer(torch.optim.Optimizer):
    """`optimizer`, a torch optimizer whose parameters may be stored in bf16 or fp16, working in fp32.

    updates: how the parameters are written, see the module. state: what the optimizer's state is stored in between
    steps: "fp32", "bf16" (rounded stochastically), "int8", "int4" or "fp8" (in blocks, by torchao). gradients: "param"
    leaves them in the dtype of their parameter; "fp32" has autograd sum them in fp32 (4 bytes per parameter; not under
    DDP), which fp16 needs under a loss scale and bf16 where many micro-batches add up; None: "fp32" for fp16 parameters
    in one process, else "param". seed: of the stochastic rounding, which draws from its own generator, seeded by (seed,
    step) anew at each step: on all processes alike, and the same after a resume.

    It takes over the settings and state that `optimizer` has and leaves that object alone: train with this one. Its
    param_groups hold the real parameters, so that schedules, GradScaler, hooks and the recorder see those.
    `state[p]` holds the optimizer's own entries and "master" or "compensation". A parameter that is changed from
    outside (clipped, loaded) keeps the change; one whose dtype changes goes on in its new one.

    Raises UsageError for another word or a missing torchao, and for optimizers that need a closure.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        updates: str = "stochastic",
        state: str = "fp32",
        gradients: str | None = None,
        seed: int = 0,
    ) -> None:
        check_updates(updates)
        check_state(state)
        if gradients not in (None, "param", "fp32"):
            raise UsageError(f"gradients must be 'param' or 'fp32' (None: chosen by dtype), not {gradients!r}")
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(f"{type(optimizer).__name__} cannot be wrapped: give a torch optimizer other than LBFGS")
        self.updates, self.stored, self.gradients, self.seed = updates, state, gradients, seed
        self.inner = _twin(optimizer)
        self._stand_ins: dict[Tensor, Tensor] = {}
        self._written: dict[Tensor, tuple[int, int, torch.dtype]] = {}
        self._widened: set[Tensor] = set()  # had fp32 gradients while they were low
        self._generators: dict[torch.device, torch.Generator] = {}
        self._by_pieces = type(optimizer).__module__.startswith("torch.optim.")  # all of them go tensor by tensor
        super().__init__([dict(g) for g in optimizer.param_groups], dict(optimizer.defaults))
        for group in self.param_groups:
            group["rounding_step"] = 0
            for key, value in group.items():
                if isinstance(value, Tensor) and value.numel() == 1:  # a learning rate, say: plain, for schedules
                    group[key] = value.item()
        for p, kept in optimizer.state.items():
            self.state[p] = {k: copied(v) for k, v in kept.items()} if isinstance(kept, dict) else kept

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("rounding_step", self.param_groups[0].get("rounding_step", 0))
        for p in group["params"]:
            if hasattr(p, "_local_tensor") and type(self.inner).__name__ in _WHOLE:
                raise UsageError(
                    f"{type(self.inner).__name__} needs whole tensors, and this model is sharded: use AdamW"
                )
            self._stand_ins[p] = torch.empty(0, device=local(p).device)
        own = {k: v for k, v in group.items() if k not in ("params", "rounding_step")}
        self.inner.param_groups.append({**own, "params": [self._stand_ins[p] for p in group["params"]]})
        for key, value in own.items():
            if isinstance(value, Tensor):
                self.inner.param_groups[-1][key] = value.clone()
        self.prepare_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer in fp32, then the parameters as `updates` says."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settings_to_inner()
        self._seed_generators()
        for piece in self._pieces():
            try:
                for p in piece:
                    self._enter(p)
                self._step_inner(piece)
                self._keep_state(piece)
                self._write(piece)
            finally:
                for p in piece:
                    self._release(p)
        for group in self.param_groups:
            group["rounding_step"] += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer."""
        super().zero_grad(set_to_none)
        self.prepare_gradients()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of state_dict(), exact; also takes that of the bare optimizer. State keeps its dtypes."""
        super().load_state_dict({**state_dict, "state": {}})  # checks and settings; state it would cast to p's dtype
        for group in self.param_groups:
            group.setdefault("rounding_step", 0)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        by_number = dict(zip(numbers, parameters, strict=True))
        fused = {p for g in self.param_groups for p in g["params"] if g.get("fused") or g.get("capturable")}
        self.state.clear()
        self._written.clear()
        for number, kept in state_dict["state"].items():
            p = by_number.get(number)
            if p is None:
                self.state[number] = kept
                continue
            stays = () if p in fused else ("step",)  # counters that optimizers keep on the CPU
            self.state[p] = {k: copied(v) if k in stays else moved(v, p) for k, v in kept.items()}
            if p.dtype in LOW and any(name in kept for name in _OURS):
                self._written[p] = _mark(local(p))  # as it lies there now is how we wrote it

    def bytes_per_parameter(self) -> float:
        """Parameters, optimizer state and what `updates` keeps, in bytes per element; gradients apart."""
        parameters = [local(p) for p in self._stand_ins]
        elements = sum(p.numel() for p in parameters)
        total = sum(p.numel() * p.element_size() for p in parameters)
        return (total + sum(size(v) for kept in self.state.values() for v in values(kept))) / max(elements, 1)

    @property
    def notes(self) -> list[str]:
        """What a reader of the run should know, in a sentence."""
        total = sum(p.numel() for p in self._stand_ins)
        low = {name: sum(p.numel() for p in self._stand_ins if p.dtype is dtype) for dtype, name in _NAMES.items()}
        stored = " and ".join(f"{n} of {total} parameters in {name}" for name, n in low.items() if n)
        what = f"{stored}, updates {_WORDS[self.updates]}" if stored else f"all {total} parameters in fp32"
        size = f"; {self.bytes_per_parameter():.1f} bytes per parameter" if self.state else ""  # none before a step
        return [f"{what}; optimizer state in {self.stored}{size}"]

    # one step

    def _pieces(self) -> Iterator[list[Tensor]]:
        """Parameters that have gradients, in pieces of so many elements that are no fp32 parameters, or of one."""
        piece: list[Tensor] = []
        size = 0
        for p in self._stand_ins:
            if p.grad is None:
                continue
            count = local(p).numel() if p.dtype in LOW or self.stored != "fp32" else 0
            if piece and self._by_pieces and size + count > _PIECE.get(p.device.type, _LARGE_PIECE):
                yield piece
                piece, size = [], 0
            piece.append(p)
            size += count
        if piece:
            yield piece

    def _enter(self, p: Tensor) -> None:
        """Give p's stand-in its value, gradient and state."""
        x, stand_in, kept = local(p), self._stand_ins[p], self.state.get(p, {})
        assert p.grad is not None
        gradient = local(p.grad)
        stand_in.data = self._value(p, x, kept)
        stand_in.grad = gradient.to(stand_in.dtype) if gradient.dtype is not stand_in.dtype else gradient
        own = {k: restore_state(local(v)) for k, v in kept.items() if k not in _OURS}
        if own:
            self.inner.state[stand_in] = own

    def _value(self, p: Tensor, x: Tensor, kept: dict[str, Any]) -> Tensor:
        """What p (here: x) stands for: its master weight, or itself and its compensation; fp32 where x is low. Elements
        that were changed from outside since they were written stand for what they are now."""
        low, written = x.dtype in LOW, self._written.get(p)
        full = _full(x, kept, x.dtype if low else written[2] if written else None)
        if full is None or (written is None and not low):
            return x.float() if low else x
        if written is not None and written != _mark(x):
            full = torch.where(full.to(written[2]) == x.to(written[2]), full, x.float())
        if low:
            return full
        return x.copy_(full)  # it was stored low until now

    def _step_inner(self, piece: list[Tensor]) -> None:
        """The wrapped optimizer's step on the stand-ins of `piece`, without hooks: those of this one were called."""
        groups = self.inner.param_groups
        if self._by_pieces:
            chosen = {id(self._stand_ins[p]) for p in piece}
            parts = [{**g, "params": [s for s in g["params"] if id(s) in chosen]} for g in groups]
            self.inner.param_groups = [part for part in parts if part["params"]]
        try:
            step: Any = type(self.inner).step
            if getattr(step, "hooked", False):  # torch wraps the step of each class, to call hooks
                step = step.__wrapped__
            step(self.inner)
        finally:
            self.inner.param_groups = groups

    def _keep_state(self, piece: list[Tensor]) -> None:
        """The optimizer's entries for the parameters of `piece`, stored as asked."""
        entries: dict[torch.device, list[tuple[Tensor, str, Tensor, Tensor]]] = {}
        for p in piece:
            stand_in = self._stand_ins[p]
            own = self.inner.state.get(stand_in, {})
            if own or p in self.state:
                self.state[p] = dict(own)
            for key, value in own.items():
                if isinstance(value, Tensor):
                    entries.setdefault(stand_in.device, []).append((p, key, value, stand_in))
        for device, found in entries.items():
            stored = store_state([entry[1:] for entry in found], self.stored, self._generator(device))
            for (p, key, _, _), value in zip(found, stored, strict=True):
                self.state[p][key] = wrapped(value, p)

    def _write(self, piece: list[Tensor]) -> None:
        """Write the parameters of `piece` from their stand-ins; high ones have been written already."""
        places: dict[torch.device, list[Tensor]] = {}
        for p in piece:
            if p.dtype in LOW:
                places.setdefault(local(p).device, []).append(p)
            else:
                self._written.pop(p, None)
                torch.autograd.graph.increment_version(p)
        for device, low in places.items():
            full = [self._stand_ins[p].detach() for p in low]
            if self.updates == "stochastic":
                full = round_together(full, [p.dtype for p in low], self._generator(device))
            for p, value in zip(low, full, strict=True):
                x = local(p)
                x.copy_(value)
                if self.updates in ("master", "kahan"):
                    name, kept = ("master", value) if self.updates == "master" else ("compensation", cut_off(value, x))
                    self.state[p][name] = wrapped(kept, p)
                    self._written[p] = _mark(x)

    def _release(self, p: Tensor) -> None:
        """The stand-in lets go of its memory, and of p's."""
        stand_in = self._stand_ins[p]
        stand_in.grad = None
        stand_in.data = torch.empty(0, device=stand_in.device)
        self.inner.state.pop(stand_in, None)

    # settings

    def _settings_to_inner(self) -> None:
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for key, value in outer.items():
                if key in ("params", "rounding_step"):
                    continue
                if isinstance(inner.get(key), Tensor) and not isinstance(value, Tensor):
                    inner[key].fill_(value)
                else:
                    inner[key] = value

    def prepare_gradients(self) -> None:
        """Have autograd keep fp32 gradients where wanted. (Under DDP it cannot: its buckets have the dtype of p.) To be
        called where parameters have changed their dtype; zero_grad does it, too."""
        single = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        for p in self._stand_ins:
            if p.grad is not None or not p.is_leaf or hasattr(p, "_local_tensor"):
                continue
            wanted = self.gradients == "fp32" or (self.gradients is None and single and p.dtype is torch.float16)
            if wanted and p.dtype in LOW:
                p.grad_dtype = torch.float32
                self._widened.add(p)
            elif p in self._widened:  # what was set once does not follow p.dtype any more
                p.grad_dtype = p.dtype

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
            self._seed(self._generators[device])
        return self._generators[device]

    def _seed_generators(self) -> None:
        for generator in self._generators.values():
            self._seed(generator)

    def _seed(self, generator: torch.Generator) -> None:
        """A stream of its own for each (seed, step), so that nothing but the step number need be saved."""
        step = int(self.param_groups[0]["rounding_step"])
        generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (1 << 63))


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_WORDS = {
    "nearest": "rounded to nearest",
    "stochastic": "rounded stochastically",
    "kahan": "with Kahan compensation",
    "master": "on fp32 master weights",
}


def check_updates(updates: str) -> None:
    """Raises UsageError where `updates` is no way to write updates."""
    if updates not in UPDATES:
        raise UsageError(f"updates must be one of {', '.join(UPDATES)}, not {updates!r}")


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer that steps like this one, with no groups, state or hooks."""
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({k: v for k, v in vars(optimizer).items() if k not in ("step", "state", "param_groups")})
    twin.__dict__.update({k: type(v)() for k, v in vars(optimizer).items() if k.startswith("_optimizer_")})
    twin.state, twin.param_groups = type(optimizer.state)(dict), []
    return twin


def _full(x: Tensor, kept: dict[str, Any], low: torch.dtype | None) -> Tensor | None:
    """The fp32 values that were kept of a parameter x, None where none were. low: what x is, or was, stored in."""
    if "master" in kept:
        return local(kept["master"])
    if "compensation" in kept and low is not None:
        return put_together(x.to(low), local(kept["compensation"]))
    return None


def _mark(x: Tensor) -> tuple[int, int, torch.dtype]:
    """What changes when somebody writes to the tensor or replaces its memory."""
    return x._version, x.data_ptr(), x.dtype
