"""What a step changes, and what state optimizers keep.

In a recorded step the parameters are copied before `optimizer.step` and compared with what they became: statistics of
dw, and the histogram of floor(log2|dw|) - floor(log2|w|) that tells which updates a storage format would swallow. The
copy costs one extra set of parameters for the length of that step. What changes elsewhere is seen by wholestep.py.

Gradients that are summed over many backward passes are looked at under way: .grad after 64, 128, 256 ... additions
gives the row (state #1, "<tensor>.grad") of the last of them, which tells whether the contributions add up or cancel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..sites import Role, Site
from .observations import Observations, Slot
from .tensors import dense, unseen
from .wholestep import DERIVED, WholeStep

_MANY = 64  # additions to .grad from which on it is looked at; 16-bit sums stop growing after 256 or more


class OptimizerWatcher:
    """Attaches to optimizers and parameters for the recorded steps.

    owners: tensor -> the weight sites of the modules that own it. names: the watched modules.
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        observations: Observations,
        owners: dict[torch.Tensor, list[Site]],
        names: dict[nn.Module, str],
    ) -> None:
        self.optimizers = list(optimizers)
        self._observations = observations
        self._owners, self._names = owners, names
        self._whole = WholeStep(names, self.optimizers, observations)
        self._handles: list[Any] = []
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._additions: Counter[torch.Tensor] = Counter()
        self._sums: dict[torch.Tensor, Slot] = {}
        self._lr: dict[tuple[int, int], float] = {}
        self._step: int | None = None

    def attach(self, step: int) -> None:
        """Hook every optimizer; what happens from now on belongs to `step`."""
        self._step = step
        self._forget_step()  # of a step that raised
        self._whole.begin()
        if self._handles:
            return
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))
        frozen = []
        for parameter in self._owners:
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._added))
            elif isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
                frozen.append(parameter)
        self._hook_once_unfrozen(frozen)

    def _hook_once_unfrozen(self, frozen: list[nn.Parameter]) -> None:
        """Loops with several optimizers freeze the other model in turns: a module that owns frozen parameters looks at
        them when it is called."""
        waiting = dict.fromkeys(frozen)
        for module in self._names if waiting else ():
            own = [p for p in module._parameters.values() if p in waiting]
            if own:
                hook = _calling(partial(self._hook_unfrozen, waiting, own))
                self._handles.append(module.register_forward_pre_hook(hook))

    def _hook_unfrozen(self, waiting: dict[nn.Parameter, None], own: list[nn.Parameter]) -> None:
        for parameter in [p for p in own if p in waiting and p.requires_grad and p.is_leaf]:
            del waiting[parameter]
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._added))

    def end_step(self) -> None:
        """The step is over, whatever changes the model outside the optimizer included."""
        if self._step is None:
            return
        for parameter, slot in self._sums.items():
            for site in self._owners[parameter]:
                self._observations.link(self._step, Site(site.module, Role.STATE, DERIVED, f"{site.tensor}.grad"), slot)
        self._whole.end(self._step)
        self._forget_step()

    def detach(self) -> None:
        """Take the hooks off and drop copies; the twins of wholestep.py live on to the next recorded step."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget_step()
        self._step = None

    def forget(self) -> None:
        """The run goes back: the next recorded step has none before it."""
        self._whole.forget()

    def describe(self) -> list[dict[str, Any]]:
        """For run.json: class and settings of each optimizer. lr is the largest of the recorded steps so far."""
        described = []
        for i, optimizer in enumerate(self.optimizers):
            groups = []
            for j, group in enumerate(optimizer.param_groups):
                settings = {k: plain for k, v in group.items() if k != "params" and (plain := _plain(v)) is not None}
                settings["lr"] = max(self._lr.get((i, j), 0.0), settings.get("lr", 0.0))
                groups.append({**settings, "parameters": self._names_of(group["params"])})
            # one that stores parameters low names the optimizer that it steps
            described.append({"class": type(getattr(optimizer, "inner", optimizer)).__name__, "groups": groups})
        return described

    def _names_of(self, parameters: Iterable[torch.Tensor]) -> list[str]:
        sites = (self._owners.get(p, [None])[0] for p in parameters)
        return [".".join(filter(None, (s.module, s.tensor))) for s in sites if s is not None]

    def _forget_step(self) -> None:
        self._before.clear()
        self._additions.clear()
        self._sums.clear()

    @unseen
    @torch.no_grad()
    def _added(self, parameter: torch.Tensor) -> None:
        """A backward pass has added to .grad."""
        self._additions[parameter] += 1
        count = self._additions[parameter]
        if count >= _MANY and count & (count - 1) == 0 and parameter.grad is not None:
            values = dense(parameter.grad)
            if values is not None:
                self._sums[parameter] = self._observations.reduce(values)

    @unseen
    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._step is not None
        self._note_lr(optimizer)
        for parameter in _parameters(optimizer):
            sites = self._owners.get(parameter)
            values = dense(parameter)
            if sites is None or values is None or parameter in self._before:
                continue
            self._before[parameter] = values.clone()
            if not _closure(args, kwargs):  # which is to compute the gradients: those there are of an earlier step
                self._record_missed_gradient(parameter, sites)

    def _note_lr(self, optimizer: torch.optim.Optimizer) -> None:
        index = next(i for i, known in enumerate(self.optimizers) if known is optimizer)
        for j, group in enumerate(optimizer.param_groups):
            lr = group.get("lr", 0.0)
            if not isinstance(lr, torch.Tensor):  # a tensor would have to be waited for
                self._lr[index, j] = max(self._lr.get((index, j), 0.0), float(lr))

    def _record_missed_gradient(self, parameter: torch.Tensor, sites: list[Site]) -> None:
        """Engines that set .grad themselves (FSDP2) never fire tensor hooks: take the unscaled .grad, this shard's."""
        assert self._step is not None
        grad_sites = [s._replace(role=Role.GRAD_WEIGHT) for s in sites]
        values = dense(parameter.grad) if parameter.grad is not None else None
        if values is not None and not self._observations.has(grad_sites[0]):
            slot = self._observations.reduce(values)
            for site in grad_sites:
                self._observations.link_unscaled(self._step, site, slot)

    @unseen
    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._step is not None
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, torch.Tensor):  # a fused optimizer decides on the device whether it steps
            found_inf = found_inf.detach().clone()
        states: list[tuple[list[Site], torch.Tensor]] = []
        for parameter in _parameters(optimizer):
            before = self._before.pop(parameter, None)
            after = dense(parameter)
            if before is None or after is None:
                continue
            sites = self._owners[parameter]
            if _closure(args, kwargs):
                self._record_missed_gradient(parameter, sites)
            update_sites = [s._replace(role=Role.UPDATE) for s in sites]
            self._observations.reduce_update(self._step, update_sites, before, after)
            if isinstance(found_inf, torch.Tensor):
                self._observations.drop_updates_if(self._step, update_sites, found_inf)
            states += _state(optimizer.state.get(parameter, {}), sites)
        slots = self._observations.reduce_many([values for _, values in states])
        for (state_sites, _), slot in zip(states, slots, strict=True):
            for site in state_sites:
                self._observations.link(self._step, site, slot)


def _calling(look: Callable[[], None]) -> Callable[..., None]:
    """A forward pre-hook, as a plain function: copy.deepcopy of a hooked model keeps it as it is."""

    def before(module: nn.Module, args: Any) -> None:
        look()

    return before


def _state(state: dict[str, Any], sites: list[Site]) -> Iterable[tuple[list[Site], torch.Tensor]]:
    """(sites, values) of a parameter's optimizer state."""
    for key, value in state.items():
        if key == "compensation":
            continue  # the lower half of a parameter's bits (training/parameters.py): no numbers by themselves
        values = dense(value) if isinstance(value, torch.Tensor) and value.dim() > 0 else None
        if values is not None:
            yield [Site(s.module, Role.STATE, 0, f"{s.tensor}.{key}") for s in sites], values


def _closure(args: Any, kwargs: Any) -> bool:
    """Whether optimizer.step was given a closure. args: with the optimizer itself first."""
    return kwargs.get("closure") is not None or any(callable(value) for value in args[1:2])


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _plain(value: Any) -> Any:
    """Settings of an optimizer as JSON has them; None for what has no such form."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return [p for v in value if (p := _plain(v)) is not None]
    return value if isinstance(value, bool | int | float | str) else None


def _inner(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and Fabric, whose own hooks never fire."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def as_list(optimizer: Any) -> list[torch.optim.Optimizer]:
    """One or several optimizers, or None, as a list. Raises UsageError for anything else."""
    if optimizer is None:
        return []
    one = isinstance(_inner(optimizer), torch.optim.Optimizer) or not isinstance(optimizer, Iterable)
    optimizers = [_inner(item) for item in ([optimizer] if one else optimizer)]
    for item in optimizers:
        if not isinstance(item, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer must be a torch.optim.Optimizer or several, optimizer=[a, b], not {type(item).__name__}"
            )
    return list({id(item): item for item in optimizers}.values())
