"""Shadow steps: the running step's batch once more in true fp32.

Under fp16 autocast what overflowed or was flushed is already lost when a hook sees it. A shadow step runs the same loss
with the same random numbers in fp32, backward included, and leaves nothing behind: it sees the ranges uncensored, the
gradient g = dL/dy of every tensor y, and so the gradient-weighted histograms that price rounding y to any format
(histogram.py); and it tells how far the running step's gradients are from the fp32 ones.

Until its gradient arrives, a tensor is kept as the exponents of its elements, 8 bits each: all that the histogram asks,
a quarter of the activations, and untouched by in-place operations. A tensor seen at several sites is priced once and
linked to all. Where x feeds several modules, g is the total gradient, the price of rounding x for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..applying.suspension import suspended
from ..batches import RandomStates
from ..errors import UsageError
from ..preservation import preserved
from ..rounding import quantize
from ..sites import Role
from ..store import CHANGES
from .distributed import average_gradients, gradients_apart, unsynchronised
from .merging import Alone
from .observations import Observations, Slot
from .tensors import dense, modes_off
from .watcher import Watcher, _Seen

if TYPE_CHECKING:
    from ..opstore import OpRecords

Closure = Callable[[], Tensor]
"""Returns the loss (of one micro-batch, divided as in the running step), without backward and without autocast."""


@dataclass(frozen=True)
class Truth:
    """How far the running step is from fp32. parameters: names; cosine, rel_error (|g - g32| / |g32|) and
    grad_norm_fp32 belong to them, NaN where the running step had no comparable gradient. loss_low: NaN where it was not
    told."""

    step: int
    loss_low: float
    loss_fp32: float
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    cosine: tuple[float, ...]
    rel_error: tuple[float, ...]
    grad_norm_fp32: tuple[float, ...]

    def columns(self) -> dict[str, Any]:
        """The columns of truth-NNNNNN.parquet."""
        n = len(self.parameters)
        return {
            "step": [self.step] * n, "parameter": list(self.parameters), "module": list(self.modules),
            "cosine": list(self.cosine), "rel_error": list(self.rel_error), "grad_norm_fp32": list(self.grad_norm_fp32),
            "loss_low": [self.loss_low] * n, "loss_fp32": [self.loss_fp32] * n,
        }  # fmt: skip


class ShadowWatcher(Watcher):
    """Watches fp32 passes and prices every tensor that gets a gradient while `pricing` is on."""

    def __init__(
        self,
        model: nn.Module,
        observations: Observations,
        *,
        max_calls: int,
        stored: dict[Tensor, Tensor],
        random: Sequence[RandomStates],
    ) -> None:
        """stored: stand-in -> the parameter that it stands for. random: the generators' states at the beginning of
        each pass of the running step."""
        super().__init__(model, observations, scale=lambda: None, max_calls=max_calls)
        self.pricing = False
        self._stored, self._random = stored, list(random)
        self._priced: set[Slot] = set()

    def _note_pass(self) -> None:
        """Let the pass draw what the running step's drew. What a loss draws beforehand may have been something else."""
        index = self.passes - 1
        if index < len(self._random):
            self._random[index].put_back()

    def _weight_values(self, tensor: Tensor) -> Tensor | None:
        return dense(self._stored.get(tensor, tensor))

    def _first_hooked(self, x: Tensor, seen: _Seen) -> None:
        if seen.slot is not None and seen.slot in self._priced:
            return  # a view that shares the slot of its base
        values = dense(x)
        if values is None or values.shape != x.shape:
            return
        if seen.slot is not None:
            self._priced.add(seen.slot)
        self._tensor_handles.append(x.register_hook(partial(self._price, seen, _exponents(values))))

    @torch.no_grad()
    def _price(self, seen: _Seen, exponents: Tensor, gradient: Tensor) -> None:
        g = dense(gradient) if self.pricing and gradient is not None else None
        if g is None or g.shape != exponents.shape:
            return
        slot = seen.slot
        if slot is None:  # its values were counted before a reentrant checkpoint recomputed them
            slot = self._observations.empty(g.device)
            assert self._step is not None
            for site in seen.grad_sites or ():
                role = Role.INPUT if site.role is Role.GRAD_INPUT else Role.OUTPUT
                self._observations.link(self._step, site._replace(role=role), slot)
        self._observations.price(slot, _representative(exponents), g)

    @torch.no_grad()
    def price_weights(self) -> None:
        """Price the parameters by their whole gradients, when all backward passes are done."""
        for parameter, slot in self.weight_slots.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            values: Tensor | None = parameter.detach()
            if gradient.layout is torch.sparse_coo:
                gradient = gradient.coalesce()
                values, gradient = parameter.detach()[gradient.indices().unbind()], gradient.values()
            y, g = dense(values), dense(gradient)  # type: ignore[arg-type]
            if y is not None and g is not None and y.shape == g.shape:
                self._observations.price(slot, y, g)
                changes = _changes(y.reshape(-1), g.reshape(-1))
                assert self._step is not None
                for site in self.owners[parameter]:
                    self._observations.set_changes(self._step, site, changes)


def _changes(y: Tensor, g: Tensor) -> Tensor:
    """Change of the loss, to first order, when y is really rounded to each of CHANGES: g (Q(y) - y), float64 [4]. What
    overflows is left out. Parameters alone are looked at so closely: their elements may lie all on one side of the
    same value (a norm's weights around 1), and their errors then add up instead of cancelling."""
    sums = torch.zeros(len(CHANGES), dtype=torch.float64, device="cpu" if y.device.type == "mps" else y.device)
    for start in range(0, y.numel(), _PIECE):
        values, gradient = y[start : start + _PIECE], g[start : start + _PIECE].to(sums.device, torch.float64)
        for i, fmt in enumerate(CHANGES):
            error = (quantize(values, fmt) - values).to(sums.device, torch.float64)
            sums[i] += torch.dot(torch.where(torch.isfinite(error), error, 0.0), gradient)
    return sums


def _exponents(values: Tensor) -> Tensor:
    """The exponent fields of fp32 (subnormals become zeros), uint8, in the shape of `values`."""
    return (values.float().view(torch.int32) >> 23).to(torch.uint8)  # modulo 256: the sign drops out


def _representative(exponents: Tensor) -> Tensor:
    """Powers of two with these exponent fields, fp32."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


@dataclass
class ShadowStep:
    """What a shadow step is told of the running one.

    step: its number. gradient_scale: parameter -> by what its .grad is still multiplied. random: generators' states at
    the beginning of the step, or of each closure; pass_random: at the beginning of each pass of the model. others:
    parameters beside the model's whose .grad must stay. ddp: what the model is wrapped in, if it is. ranks: who shares
    the work.
    """

    step: int
    gradient_scale: Callable[[Tensor], float | Tensor]
    random: Sequence[RandomStates]
    pass_random: Sequence[RandomStates]
    others: Iterable[Tensor] = ()
    max_calls: int = 16
    ddp: nn.parallel.DistributedDataParallel | None = None
    ranks: Alone = field(default_factory=Alone)

    def run(
        self, model: nn.Module, closures: Sequence[Closure], loss: Tensor | float | None
    ) -> tuple[Observations, Truth]:
        """Run the closures, forward and backward, in fp32. Waits for the device once, at the end.

        Raises UsageError where a closure does not return a scalar loss; what the closures raise passes through.
        """
        observations = Observations(self.ranks.world)
        with ExitStack() as stack:
            running = stack.enter_context(gradients_apart(model, self.ddp))
            stored = stack.enter_context(self._aside(model))
            watcher = ShadowWatcher(
                model, observations, max_calls=self.max_calls, stored=stored, random=self.pass_random
            )
            stack.callback(watcher.detach)
            watcher.attach(self.step)
            total = self._backward(watcher, closures)
            if self.ddp is not None:
                average_gradients(model, self.ddp)
            watcher.price_weights()
            alike = self._is_same_work(watcher, any_gradient=any(g is not None for g in running.values()))
            truth = self._compare(watcher, stored, running if alike else {}, total, loss)
        return observations, truth

    @contextmanager
    def _aside(self, model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
        """`suspended(model)`, seen by nobody else, with everything put back that a loss and a backward pass change."""
        with ExitStack() as stack:
            stack.enter_context(modes_off())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(preserved(model))
            stack.enter_context(_gradients_kept(self.others))
            stack.enter_context(_no_accumulate_hooks(list(model.parameters())))
            stack.enter_context(unsynchronised(self.ddp))
            yield stack.enter_context(suspended(model))

    def run_ops(self, model: nn.Module, closures: Sequence[Closure]) -> OpRecords:
        """Run the closures once more in fp32, forward and backward, at op level, with nobody else watching."""
        from .ops import record_ops

        with ExitStack() as stack:
            stack.enter_context(gradients_apart(model, self.ddp))
            stack.enter_context(self._aside(model))
            ops = stack.enter_context(record_ops(model))
            self._backward(None, closures)
            return ops.records()

    def _backward(self, watcher: ShadowWatcher | None, closures: Sequence[Closure]) -> Tensor:
        """All closures, forward and backward, priced by `watcher` where there is one; the sum of their losses."""
        total: Tensor | None = None
        for index, closure in enumerate(closures):
            if index < len(self.random):
                self.random[index].put_back()
            with torch.enable_grad():
                loss = closure()
            _check_loss(loss)
            if watcher is not None:
                watcher.pricing = True
            loss.backward()
            if watcher is not None:
                watcher.pricing = False
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total.reshape(())

    def _is_same_work(self, watcher: ShadowWatcher, *, any_gradient: bool) -> bool:
        if watcher.passes == len(self.pass_random) or not any_gradient:
            return True
        warnings.warn(
            f"the shadow step ran the model {watcher.passes} times, the step itself {len(self.pass_random)} times: its "
            "gradients are not compared; pass a list with one closure per micro-batch, after the last backward()",
            RuntimeWarning,
            stacklevel=5,
        )
        return False

    def _compare(
        self,
        watcher: ShadowWatcher,
        stored: dict[Tensor, Tensor],
        running: dict[Any, Tensor | None],
        total: Tensor,
        loss: Tensor | float | None,
    ) -> Truth:
        names: list[tuple[str, str]] = []
        moments, sites_of = [], []
        for parameter, sites in watcher.owners.items():
            if parameter.grad is None:
                continue
            own = stored.get(parameter, parameter)
            low = running.get(own)
            moments.append(_moments(low, self.gradient_scale(own), parameter.grad))
            names.append((".".join(filter(None, (sites[0].module, sites[0].tensor))), sites[0].module))
            sites_of.append(sites[0])
        losses = torch.stack([total.double().cpu(), torch.as_tensor(_number(loss)).detach().double().cpu().reshape(())])
        losses = self.ranks.mean(losses)
        # one copy to the host, not one wait per parameter
        rows = torch.stack([m.to(moments[0].device) for m in moments]).cpu() if moments else torch.zeros(0, 4).double()
        rows = self.ranks.total(rows, sites_of)
        figures = [_figures(*row) for row in rows.tolist()]
        loss_fp32, loss_low = losses.tolist()
        return Truth(
            self.step, loss_low, loss_fp32, tuple(n for n, _ in names), tuple(m for _, m in names),
            *(tuple(column) for column in zip(*figures, strict=True)) if figures else ((), (), ()),
        )  # fmt: skip


def _number(loss: Tensor | float | None) -> Tensor | float:
    return float("nan") if loss is None else loss


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"the closure of a shadow step must return the loss, a scalar with a gradient, not {what}: "
            "rec.shadow(lambda: loss(model, batch))"
        )


_PIECE = 1 << 20


def _moments(low: Tensor | None, scale: float | Tensor, reference: Tensor) -> Tensor:
    """Sums over the elements of g32^2, g^2, g g32 and (g - g32)^2, float64 [4], where g = low / scale; NaN but for the
    first without `low`."""
    ref = _plain_gradient(reference)
    device = torch.device("cpu") if ref.device.type == "mps" else ref.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    own = _plain_gradient(low) if low is not None else None
    if own is not None and own.shape != ref.shape:
        own = None
    divisor = scale.to(device, torch.float64) if isinstance(scale, Tensor) else scale
    for start in range(0, ref.numel(), _PIECE):
        g32 = ref[start : start + _PIECE].to(device, torch.float64)
        sums[0] += g32.square().sum()
        if own is not None:
            g = own[start : start + _PIECE].to(device, torch.float64) / divisor
            sums[1] += g.square().sum()
            sums[2] += (g * g32).sum()
            sums[3] += (g - g32).square().sum()
    if own is None:
        sums[1:] = float("nan")
    return sums


def _plain_gradient(gradient: Tensor) -> Tensor:
    """As one dimension of dense elements: this rank's shard; a sparse gradient in full."""
    gradient = gradient.detach()
    if gradient.layout is not torch.strided:
        return gradient.to_dense().reshape(-1)
    values = dense(gradient)
    return (gradient if values is None else values).reshape(-1)


def _figures(square32: float, square: float, product: float, error: float) -> tuple[float, float, float]:
    """(cosine, relative error, norm of the fp32 gradient)."""
    norm32, norm = square32**0.5, square**0.5
    cosine = product / (norm32 * norm) if norm32 * norm > 0 else float("nan")
    relative = error**0.5 / norm32 if norm32 > 0 else 0.0 if error == 0 else float("inf")
    return cosine, relative if error == error else float("nan"), norm32


@contextmanager
def _gradients_kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put .grad of these back: of a loss that has parameters of its own."""
    kept = {p: p.grad for p in parameters}
    for parameter in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient


@contextmanager
def _no_accumulate_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take post-accumulate hooks off: an optimizer that steps inside backward must not step now."""
    silenced = []
    for parameter in parameters:
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks:
            silenced.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in silenced:
            hooks.update(kept)
