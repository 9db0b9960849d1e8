"""The whole step: what every owned tensor was before it and after it, and what 16-bit storage would have missed.

Optimizers are not all that changes a model: EMA copies, running statistics, counters and manual updates change it too.
At the beginning of a recorded step a sample of each owned floating tensor is taken (evenly strided, at most
`_SAMPLE` elements, so that a model of any size costs little), and compared with what it is at the end:

- Tensors that no optimizer holds get UPDATE rows, like the parameters in updates.py.
- Trained tensors get rows (state #1, "<tensor>.swallowed_<format>"): the updates that storing the tensor in that format
  would swallow (rounding to nearest gives the old value again), zero elsewhere. Their sum of squares beside that of all
  updates is the share of the update energy that is lost, which for SGD is the share of the progress to first order.
- The others get rows (state #1, "<tensor>.stuck_<format>"), from twins. A twin starts as the tensor does; where
  the update is not swallowed it follows the tensor, else it stays. Its distance from the tensor is what the format has
  lost: updates that cancel leave none, updates that add up in one direction leave all of it. The rows hold it in ulps
  of the format, zero below `_STUCK` ulps.

A row that would be all zero is left out. Unrecorded steps are taken to be like the recorded ones around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..formats import get_format
from ..sites import Role, Site
from .observations import Observations
from .tensors import dense, unseen

DERIVED = 1
"""Call index of rows of role state that are not state of an optimizer, so that they merge with none."""

_SAMPLE = 1 << 14
_STUCK = 2.0
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class _Group:
    """The tensors of one device. flat: their samples end to end, fp32. twins: format -> likewise."""

    places: list[Site]  # with role UPDATE
    sizes: list[int]
    flat: torch.Tensor
    twins: dict[str, torch.Tensor]


class WholeStep:
    """Samples of the tensors that `names` own, compared over each recorded step."""

    def __init__(
        self, names: dict[nn.Module, str], optimizers: Iterable[torch.optim.Optimizer], observations: Observations
    ) -> None:
        self._names = names
        self._optimizers = list(optimizers)
        self._observations = observations
        self._groups: dict[str, _Group] = {}

    @unseen
    @torch.no_grad()
    def begin(self) -> None:
        """Take samples; twins go on from the previous recorded step where the tensors are the same."""
        before, self._groups = self._groups, {}
        for device, (places, samples) in self._samples().items():
            flat, sizes = torch.cat(samples), [len(s) for s in samples]
            old = before.get(device)
            same = old is not None and old.places == places and old.sizes == sizes
            twins = old.twins if same and old is not None else {name: flat.clone() for name in _FORMATS}
            self._groups[device] = _Group(places, sizes, flat, twins)

    def forget(self) -> None:
        """Drop samples and twins."""
        self._groups.clear()

    @unseen
    @torch.no_grad()
    def end(self, step: int) -> None:
        """Compare with the samples of the beginning and write the rows of `step`."""
        held = {id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        outside = {place for place, tensor in self._tensors() if id(tensor) not in held}
        trained = {place for place, tensor in self._tensors() if id(tensor) in held or tensor.requires_grad}
        now = self._samples()
        for device, group in self._groups.items():
            places, samples = now.get(device, ([], []))
            if places != group.places or [len(s) for s in samples] != group.sizes:
                continue  # the model was changed under way
            after = torch.cat(samples)
            self._updates(step, group, after, outside)
            for name, twin in group.twins.items():
                swallowed, stuck = _lost(group.flat, after, twin, name)
                rest = set(places) - trained
                self._rows(step, group, swallowed, trained, f"swallowed_{name}")
                self._rows(step, group, stuck, rest, f"stuck_{name}")

    def _updates(self, step: int, group: _Group, after: torch.Tensor, outside: set[Site]) -> None:
        changed = (after != group.flat) & ~(after.isnan() & group.flat.isnan())
        parts = zip(group.places, group.flat.split(group.sizes), after.split(group.sizes), strict=True)
        for (place, old, new), moved in zip(parts, changed.split(group.sizes), strict=True):
            if place in outside and _wanted(moved):
                self._observations.reduce_update(step, [place], old, new)
                self._drop_if_empty(step, place, moved)

    def _rows(self, step: int, group: _Group, values: torch.Tensor, places: set[Site], suffix: str) -> None:
        for place, part in zip(group.places, values.split(group.sizes), strict=True):
            if place in places and _wanted(part):
                site = place._replace(role=Role.STATE, call=DERIVED, tensor=f"{place.tensor}.{suffix}")
                self._observations.link(step, site, self._observations.reduce(part))
                self._drop_if_empty(step, site, part)

    def _drop_if_empty(self, step: int, site: Site, values: torch.Tensor) -> None:
        """On other devices than the CPU nothing waits for the values: the row is dropped when it is written."""
        if values.device.type != "cpu":
            self._observations.drop_updates_if(step, [site], (~values.any()).float())

    def _tensors(self) -> Iterable[tuple[Site, torch.Tensor]]:
        """Owned floating tensors as they are now (a module may replace its buffers), shared ones under one owner."""
        seen: set[int] = set()
        for module, name in self._names.items():
            for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield Site(name, Role.UPDATE, 0, local), tensor

    def _samples(self) -> dict[str, tuple[list[Site], list[torch.Tensor]]]:
        """device -> (places, samples fp32 [at most _SAMPLE each]), copies."""
        found: dict[str, tuple[list[Site], list[torch.Tensor]]] = {}
        for place, tensor in self._tensors():
            values = dense(tensor)
            if values is None or values.numel() == 0 or values.layout is not torch.strided:
                continue
            places, samples = found.setdefault(str(values.device), ([], []))
            places.append(place)
            samples.append(sample(values).float())
        return found


def sample(values: torch.Tensor) -> torch.Tensor:
    """At most _SAMPLE elements, evenly strided; an odd stride, so that no column of a matrix is always missed."""
    flat = values.reshape(-1)
    stride = -(-flat.numel() // _SAMPLE)
    return flat[:: stride | 1]


def _wanted(values: torch.Tensor) -> bool:
    return values.device.type != "cpu" or bool(values.any())


def _lost(
    before: torch.Tensor, after: torch.Tensor, twin: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(swallowed updates, distance from the twin in ulps), zero where there is none; moves the twin on."""
    dtype, fmt = _FORMATS[name], get_format(name)
    update, stored = after - before, before.to(dtype)
    swallowed = ((stored.float() + update).to(dtype) == stored) & torch.isfinite(stored) & torch.isfinite(after)
    torch.where(swallowed, twin, after, out=twin)
    binade = torch.frexp(after.abs()).exponent - 1  # of zero: -1, whose ulp is as good as any
    ulp = torch.exp2((binade.clamp(min=fmt.emin) - fmt.precision).float())
    stuck = (after - twin).abs() / ulp
    zero = torch.zeros_like(stuck)
    return torch.where(swallowed, update, zero), torch.where((stuck >= _STUCK) & torch.isfinite(stuck), stuck, zero)
