"""Hooks on modules and tensors: who sees which tensor, reduced once.

Forward pre-hooks see inputs before an in-place module changes them, forward hooks see outputs, tensor hooks see
gradients. Full backward hooks are avoided: they wrap inputs and outputs, which breaks on views and in-place operations.
A tensor hook on x sees dL/dx in full: where x feeds several modules, grad_input of each is that total.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..batches import RandomStates
from ..sites import Role, Site
from .observations import Observations, Slot
from .owners import parameter_owners, sharded_parameters, watched_modules
from .tensors import call_tensors, dense, named_tensors

_MOST_PASSES = 4096  # of one step, whose random states are kept: 30 kB each


class _Seen:
    """A tensor that was met in the current pass."""

    __slots__ = ("consumers", "elements", "grad_sites", "producer", "ref", "returned_to", "slot", "version")

    def __init__(self, x: torch.Tensor, slot: Slot | None, producer: str) -> None:
        self.ref = weakref.ref(x)
        self.version = _version(x)
        self.slot = slot
        self.producer = producer
        self.elements = x.numel()
        self.grad_sites: list[Site] | None = None
        self.consumers: list[str] = []  # modules that took it as an input
        self.returned_to: str | None = None  # the module whose own code took it last

    def is_same(self, x: torch.Tensor) -> bool:
        return self.ref() is x and self.version == _version(x)


class Watcher:
    """Attaches to a model for the recorded steps and links what passes to rows of `observations`.

    max_calls: calls of one module beyond this many within a pass share the last call index. training: leave out what
    is no training: passes without gradients of a model in eval mode.

    A pass is one forward of the root. Where the loop calls parts of it instead (a container of two models, a
    LightningModule), a pass begins with the first call in a step, and with the first one after a gradient was seen, so
    that micro-batches count their calls alike.

    Parts that a reentrant checkpoint recomputes inside backward come in reverse order: the gradients of a module that
    was called n times are given to calls n - 1 down to 0, which is right where each checkpointed part calls it once.
    Copies and replicas of the model, which share its hooks, are not recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        observations: Observations,
        *,
        scale: Callable[[], float | torch.Tensor | None],
        max_calls: int = 16,
        training: bool = False,
    ) -> None:
        self.model = model
        self.names = watched_modules(model)
        self.owners = parameter_owners(self.names)
        self.edges: dict[tuple[str, str], int] = {}
        self.calls: Counter[str] = Counter()
        self.passes = 0
        self.flops: Counter[str] = Counter()  # estimated, over all passes
        self.elements: dict[str, int] = {}
        self._observations = observations
        self._scale = scale
        self._max_calls = max_calls
        self._training = training
        self._handles: list[Any] = []
        self._frozen: dict[torch.Tensor, list[Site]] = {}  # parameters that could not be hooked -> gradient sites
        self._fresh = True  # whether the next call of a part begins a pass
        self._tensor_handles: list[Any] = []
        self._seen: dict[int, _Seen] = {}
        self._stack: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter()
        self._recomputed: Counter[str] = Counter()
        self._grad_hooked: set[Site] = set()
        self._sharded = sharded_parameters(self.owners)
        self._gathered: dict[int, torch.Tensor] = {}  # whole parameters that FSDP2 puts in place of shards, hooked
        self._step: int | None = None
        self._weights_done = False
        self.weight_slots: dict[torch.Tensor, Slot] = {}  # of the running step
        self.began: RandomStates | None = None  # the generators at the step's beginning
        self.passes_began: list[RandomStates] = []  # and at that of each of its passes
        self.versions: list[int] = []  # of the parameters at the beginning of the last pass
        self.paused = False

    @property
    def attached(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def attach(self, step: int) -> None:
        """Hook every watched module and parameter; what passes from now on belongs to `step`."""
        self._step, self._weights_done, self._fresh = step, False, True
        self.weight_slots.clear()
        self.began = RandomStates.take(cuda=True)
        self.passes_began, self.versions = [], []
        if self._handles:
            return
        before, after = self._module_hooks()
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        self._frozen = {
            p: [s._replace(role=Role.GRAD_WEIGHT) for s in sites]
            for p, sites in self.owners.items()
            if isinstance(p, nn.Parameter) and p.is_floating_point()
        }
        self._hook_unfrozen()

    def _hook_unfrozen(self) -> None:
        """Watch the gradients of parameters that have one by now: loops with several optimizers freeze the other model
        in turns."""
        for parameter in [p for p in self._frozen if p.requires_grad]:
            sites = self._frozen.pop(parameter)
            self._handles.append(parameter.register_hook(partial(self._gradient, sites)))

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_step()
        self._step = None

    def end_step(self) -> None:
        """Forget the tensors of the step; hooks left on its graph are removed."""
        for handle in self._tensor_handles:
            handle.remove()
        self._tensor_handles.clear()
        self._gathered.clear()
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._forget(list(self._seen))
        self._begin_counting()

    def _begin_pass_of_parts(self) -> None:
        """Like `_begin_pass`, but tensors that live on are known: one part's output may be another's input."""
        self._forget([key for key, seen in self._seen.items() if seen.ref() is None])
        self._begin_counting()

    def _forget(self, keys: list[int]) -> None:
        for key in keys:
            self._add_edges(self._seen.pop(key))

    def _begin_counting(self) -> None:
        self._counts.clear()
        self._recomputed.clear()
        self._grad_hooked.clear()
        self._stack.clear()

    # hooks

    def _module_hooks(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """Plain functions: copy.deepcopy of a hooked model keeps them as they are, bound methods would be copied."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._concerns(module):
                self._before(module, args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._concerns(module):
                self._after(module, output)

        return before, after

    def _concerns(self, module: nn.Module) -> bool:
        """Not while paused, not copies and replicas, not under torch.func transforms, whose tensors have no data."""
        outside = self._step is None or self.paused or module not in self.names or self._is_evaluation()
        return not outside and torch._C._functorch.peek_interpreter_stack() is None

    def _is_evaluation(self) -> bool:
        """Whether a pass that is no part of the training begins or goes on."""
        return self._training and not self.model.training and not self._stack and not torch.is_grad_enabled()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recompute = _inside_backward()
        if not recompute and not self._stack:
            self._begin_call(module)
        if not self._weights_done:
            self._record_weights()
        name = self.names[module]
        if name in self._sharded:
            self._hook_gathered(module, self._sharded[name])
        call = self._call_index(name, recompute)
        for path, x in call_tensors(args, kwargs):
            seen = self._see(x, Site(name, Role.INPUT, call, path), recompute)
            if seen is not None and not recompute:
                seen.consumers.append(name)
        self._stack.append((name, call))

    def _begin_call(self, module: nn.Module) -> None:
        """The loop calls `module`."""
        if self._frozen:
            self._hook_unfrozen()
        if module is self.model:
            self._begin_pass()
        elif self._fresh:
            self._begin_pass_of_parts()
        else:
            return
        self._fresh = False
        self.passes += 1
        self._note_pass()

    def _hook_gathered(self, module: nn.Module, sites: dict[str, list[Site]]) -> None:
        """Watch the gradients of parameters that FSDP2 gathers for this call: this process's own, before they are
        averaged and sharded. Hooks on the shards never fire."""
        for local, places in sites.items():
            whole = module._parameters.get(local)
            if whole is None or hasattr(whole, "placements") or not whole.requires_grad or id(whole) in self._gathered:
                continue
            self._gathered[id(whole)] = whole
            self._tensor_handles.append(whole.register_hook(partial(self._gradient, places)))

    def _note_pass(self) -> None:
        """What a shadow step needs to draw the same random numbers, and to see that no optimizer stepped since."""
        if len(self.passes_began) < _MOST_PASSES:
            self.passes_began.append(RandomStates.take(cuda=True))
        self.versions = self.parameter_versions()

    def parameter_versions(self) -> list[int]:
        """How often each parameter was written to in place."""
        return [_version(p) for p in self.owners if isinstance(p, nn.Parameter)]

    def _call_index(self, name: str, recompute: bool) -> int:
        """Which call of the module in this pass this is, from 0; recomputed calls count down."""
        if recompute:
            index = max(self._counts[name] - 1 - self._recomputed[name], 0)
            self._recomputed[name] += 1
        else:
            index = self._counts[name]
            self._counts[name] += 1
        return min(index, self._max_calls - 1)

    def _after(self, module: nn.Module, output: Any) -> None:
        name = self.names[module]
        while self._stack:  # calls that raised below us may have left theirs
            top, call = self._stack.pop()
            if top == name:
                break
        else:
            return
        recompute = _inside_backward()
        if not recompute:
            self.calls[name] += 1
        for path, x in named_tensors(output):
            seen = self._see(x, Site(name, Role.OUTPUT, call, path), recompute)
            if seen is not None and not recompute:
                seen.returned_to = self._stack[-1][0] if self._stack else None
                self.elements[name] = max(self.elements.get(name, 0), x.numel())
                self.flops[name] += _estimated_flops(module, x)

    def _gradient(self, sites: list[Site], gradient: torch.Tensor) -> None:
        if self._step is None or gradient is None or self.paused:
            return
        self._fresh = True
        values = dense(gradient)
        if values is None:
            return
        if not self._observations.has_scale(self._step):
            scale = self._scale()
            self._observations.set_scale(self._step, 1.0 if scale is None else scale)
        seen = self._find(gradient)
        if seen is None:
            seen = self._remember(gradient, self._observations.reduce_gradient(values), "")
        assert seen.slot is not None
        for site in sites:
            self._observations.link(self._step, site, seen.slot)

    # one tensor

    def _see(self, x: torch.Tensor, site: Site, recompute: bool) -> _Seen | None:
        """Reduce `x` unless it was met before, link it to `site`, and hook its gradient.

        While a checkpointed part is recomputed inside backward, the values were counted already; only gradients are
        hooked, since a reentrant checkpoint has its graph from here alone.
        """
        assert self._step is not None
        seen = self._find(x)
        if recompute and seen is not None and seen.slot is not None:
            return seen  # it was met in the forward pass, its gradient hooked there
        if seen is None:
            values = dense(x)
            if values is None:
                return None
            slot = None if recompute else self._slot_of(x, values)
            producer = site.module if site.role is Role.OUTPUT else self._stack[-1][0] if self._stack else ""
            seen = self._remember(x, slot, producer)
        if seen.slot is not None and not recompute:
            self._observations.link(self._step, site, seen.slot)
        if x.requires_grad:
            self._hook_gradient(x, seen, site, recompute)
        return seen

    def _hook_gradient(self, x: torch.Tensor, seen: _Seen, site: Site, recompute: bool) -> None:
        site = site._replace(role=Role.GRAD_INPUT if site.role is Role.INPUT else Role.GRAD_OUTPUT)
        if recompute and site in self._grad_hooked:
            return
        if not recompute:
            self._grad_hooked.add(site)
        if seen.grad_sites is None:
            seen.grad_sites = []
            self._tensor_handles.append(x.register_hook(partial(self._gradient, seen.grad_sites)))
            self._first_hooked(x, seen)
        seen.grad_sites.append(site)

    def _first_hooked(self, x: torch.Tensor, seen: _Seen) -> None:
        """Called once for each tensor whose gradient is watched; for subclasses."""

    def _slot_of(self, x: torch.Tensor, values: torch.Tensor) -> Slot:
        """The slot of a view's base where the view only reshapes it, else a new one."""
        base = x._base if x._is_view() else None
        if base is not None and base.numel() == x.numel() and base.dtype == x.dtype:
            seen = self._find(base)
            if seen is not None and seen.slot is not None:
                return seen.slot
        return self._observations.reduce(values)

    def _remember(self, x: torch.Tensor, slot: Slot | None, producer: str) -> _Seen:
        gone = self._seen.get(id(x))  # another tensor at the same place in memory, freed by now
        if gone is not None:
            self._add_edges(gone)
        seen = self._seen[id(x)] = _Seen(x, slot, producer)
        return seen

    def _find(self, x: torch.Tensor) -> _Seen | None:
        seen = self._seen.get(id(x))
        return seen if seen is not None and seen.is_same(x) else None

    def _add_edges(self, seen: _Seen) -> None:
        """Edges to the innermost modules that took the tensor, or to the one whose own code received it."""
        takers = {c for c in seen.consumers if not any(_is_below(other, c) for other in seen.consumers)}
        if not seen.consumers and seen.returned_to is not None:
            takers = {seen.returned_to}
        for taker in takers - {seen.producer}:
            key = (seen.producer, taker)
            self.edges[key] = max(seen.elements, self.edges.get(key, 0))

    def _record_weights(self) -> None:
        assert self._step is not None
        self._weights_done = True
        with torch.no_grad():
            values = {tensor: x for tensor in self.owners if (x := self._weight_values(tensor)) is not None}
            self.weight_slots.update(zip(values, self._observations.reduce_many(list(values.values())), strict=True))
            for tensor in values:
                for site in self.owners[tensor]:
                    self._observations.link(self._step, site, self.weight_slots[tensor])

    def _weight_values(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return dense(tensor)


def _is_below(name: str, ancestor: str) -> bool:
    return name != ancestor and (not ancestor or name.startswith(ancestor + "."))


def _estimated_flops(module: nn.Module, output: torch.Tensor) -> int:
    """2 per weight and output position of the module's own matrices; a look-up table multiplies nothing."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    return sum(2 * output.numel() * p.numel() // max(p.shape[0], 1) for p in matrices)


def _version(x: torch.Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
