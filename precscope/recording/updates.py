"""Hooks on optimizers: what each step changes, and what state it keeps.

In a recorded step the parameters are copied before `optimizer.step` and compared with what they became: statistics of
dw, and the histogram of floor(log2|dw|) - floor(log2|w|) that tells which updates a storage format would swallow. The
copy costs one extra set of parameters for the length of that step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..sites import Role, Site
from .observations import Observations
from .tensors import dense


class OptimizerWatcher:
    """Attaches to optimizers for the recorded steps."""

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        observations: Observations,
        owners: dict[torch.Tensor, list[Site]],
    ) -> None:
        self.optimizers = list(optimizers)
        self._observations = observations
        self._owners = owners
        self._handles: list[Any] = []
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._step: int | None = None

    def attach(self, step: int) -> None:
        """Hook every optimizer; what it does from now on belongs to `step`."""
        self._step = step
        self._before.clear()  # of an optimizer step that raised
        if self._handles:
            return
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def detach(self) -> None:
        """Take the hooks off and drop copies."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()
        self._step = None

    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._step is not None
        for parameter in _parameters(optimizer):
            sites = self._owners.get(parameter)
            values = dense(parameter)
            if sites is None or values is None or parameter in self._before:
                continue
            self._before[parameter] = values.clone()
            self._record_missed_gradient(parameter, sites)

    def _record_missed_gradient(self, parameter: torch.Tensor, sites: list[Site]) -> None:
        """Engines that set .grad themselves (FSDP2) never fire tensor hooks: take the unscaled .grad, this shard's."""
        assert self._step is not None
        grad_sites = [s._replace(role=Role.GRAD_WEIGHT) for s in sites]
        values = dense(parameter.grad) if parameter.grad is not None else None
        if values is not None and not self._observations.has(grad_sites[0]):
            slot = self._observations.reduce(values)
            for site in grad_sites:
                self._observations.link_unscaled(self._step, site, slot)

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._step is not None
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, torch.Tensor):  # a fused optimizer decides on the device whether it steps
            found_inf = found_inf.detach().clone()
        for parameter in _parameters(optimizer):
            before = self._before.pop(parameter, None)
            after = dense(parameter)
            if before is None or after is None:
                continue
            sites = self._owners[parameter]
            update_sites = [s._replace(role=Role.UPDATE) for s in sites]
            self._observations.reduce_update(self._step, update_sites, before, after)
            if isinstance(found_inf, torch.Tensor):
                self._observations.drop_updates_if(self._step, update_sites, found_inf)
            self._record_state(optimizer.state.get(parameter, {}), sites)

    def _record_state(self, state: dict[str, Any], sites: list[Site]) -> None:
        assert self._step is not None
        for key, value in state.items():
            values = dense(value) if isinstance(value, torch.Tensor) and value.dim() > 0 else None
            if values is None:
                continue
            slot = self._observations.reduce(values)
            for site in sites:
                self._observations.link(self._step, Site(site.module, Role.STATE, 0, f"{site.tensor}.{key}"), slot)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
