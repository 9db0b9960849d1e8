"""The recorder with Keras's names, variables and optimizers in place of torch's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recording import Recorder
from ..recording import graph as graphs
from ..recording.observations import Observations
from ..recording.tensors import dense, unseen
from ..recording.watcher import Watcher
from ..recording.wholestep import WholeStep
from ..sites import Role, Site
from .keras_layers import KerasLayers, estimated_flops

_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_STATES = {  # Keras optimizer -> attribute -> what torch's optimizers call the same, by which advice knows it
    "Adam": {"_momentums": "exp_avg", "_velocities": "exp_avg_sq", "_velocity_hats": "max_exp_avg_sq"},
    "Adamax": {"_m": "exp_avg", "_u": "exp_inf"},
    "RMSprop": {"_velocities": "square_avg", "_momentums": "momentum_buffer", "_average_gradients": "grad_avg"},
    "SGD": {"momentums": "momentum_buffer"},
    "Lion": {"_momentums": "exp_avg"},
    "Adagrad": {"_accumulators": "sum"},
}
_STATES |= {"AdamW": _STATES["Adam"], "Nadam": _STATES["Adam"]}


class KerasRecorder(Recorder):
    """Records a Keras model; steps are bracketed by `begin` and `step`, and nothing is seen outside.

    kind: "train", or "test" or "predict" for inference. settings: as for `ps.record`. The optimizer is the model's.
    """

    def __init__(self, model: Any, out: str | Path, *, kind: str = "train", **settings: Any) -> None:
        self._layers = KerasLayers.of(model)
        self._keras = model.optimizer if kind == "train" else None
        info = {"task": model.name, "parameters": model.count_params(), **_precision(self._layers)}
        info |= {"keras": {"paths": self._layers.paths, "policies": _policies(self._layers)}}
        if kind != "train":
            info["mode"] = "inference"
        super().__init__(
            model, out, scaler=LossScale(self._keras), **{**settings, "info": {**info, **(settings.get("info") or {})}}
        )
        self._begun = False
        self._accumulates = bool(getattr(_inner(self._keras), "gradient_accumulation_steps", None))
        self._stepped = int(_iterations(self._keras)) if self._accumulates else 0

    def is_step(self) -> bool:
        """Whether the optimizer has stepped after a batch: always, but where it accumulates gradients.

        Its count is then read from the device after every batch. Keras reads it there, too, before it decides whether
        to step, so that little is left to wait for. Batches counted here would be wrong where Keras calls us once for
        several (steps_per_execution), and where a loss scale leaves one out."""
        if not self._accumulates:
            return True
        before, self._stepped = self._stepped, int(_iterations(self._keras))
        return self._stepped != before

    def begin(self) -> None:
        """A batch begins, the first of its step or a further one."""
        if not self._begun:
            self._begun = True
            super()._begin_step()
        self._watcher.paused = False

    def pause(self) -> None:
        """A batch is over; what comes until the next `begin` is not recorded."""
        self._watcher.paused = True

    # what Recorder does otherwise

    def _begin(self) -> None:
        super()._begin()
        self._watcher: Watcher = _LayerWatcher(
            self.model, self._observations, self._layers, scale=self._loss_scale, max_calls=self._max_calls
        )
        self._updates: Any = _VariableWatcher(self._keras, self._observations, self._layers)

    def _begin_step(self) -> None:
        """Not yet: other callbacks, and validation, come first."""
        self._begun = False
        self._detach()

    def _write_graph(self) -> None:
        content = graphs.describe(self._watcher, self.flops)
        own: Counter[str] = Counter()
        buffers = self._layers.buffers()
        for name, _, tensor, kept in self._layers.variables():
            own[name] += 0 if kept else tensor.numel()
        inner = {name.rpartition(".")[0] for name in self._layers.paths if name}
        for module in content["modules"]:
            name = module["name"]
            module["own_params"], module["leaf"] = own[name], name not in inner
            module["params"] = sum(n for other, n in own.items() if not name or f"{other}.".startswith(f"{name}."))
        for parameter in content["parameters"]:
            parameter["buffer"] = tuple(parameter["name"].rpartition(".")[::2]) in buffers
        self._output.graph(content)

    def _described(self, status: str) -> dict[str, Any]:
        optimizers = self._updates.describe() if self._keras is not None else []
        return {**super()._described(status), **({"optimizers": optimizers} if optimizers else {})}


class LossScale:
    """The loss scale of a Keras optimizer, as a recorder reads that of a GradScaler."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def is_enabled(self) -> bool:
        """Whether the loss is scaled at all."""
        return self._value() is not None

    def get_scale(self) -> float:
        """The scale of the running step."""
        return float(self._value())

    def _get_scale_async(self) -> torch.Tensor | None:
        value = getattr(self._value(), "value", None)  # of a Keras variable: on its device
        return None if value is None else value.detach()

    def _value(self) -> Any:
        dynamic = getattr(self._optimizer, "dynamic_scale", None)
        return getattr(self._optimizer, "loss_scale_factor", None) if dynamic is None else dynamic


class _LayerWatcher(Watcher):
    """Watches Keras layers, under their names."""

    def __init__(self, model: nn.Module, observations: Observations, layers: KerasLayers, **settings: Any) -> None:
        super().__init__(model, observations, **settings)
        self.names, self.owners, self._sharded = layers.names, layers.owners(), {}
        self._cells = layers.cells

    def _after(self, module: nn.Module, output: Any) -> None:
        name = self.names[module]
        before = self.calls[name]
        super()._after(module, output)
        cell = self._cells.get(module)
        if self.calls[name] > before and (cell is None or not self.calls[self.names[cell]]):
            first = next((x for x in _tensors(output) if dense(x) is not None), None)
            self.flops[name] += 0 if first is None else estimated_flops(cell or module, first)


class _VariableWatcher:
    """What a step changes, and the optimizer's state: `recording.updates` for Keras.

    A copy of the learnt variables is taken when a recorded step begins and compared with what they are at its end, so
    that an update is all that the step did to them. Where the optimizer left its step out (an overflow under a loss
    scale) its updates are left out, too.
    """

    def __init__(self, optimizer: Any, observations: Observations, layers: KerasLayers) -> None:
        self._optimizer, self._observations = _inner(optimizer), observations
        self._owners = layers.owners()
        self._learnt = [tensor for tensor in self._owners if tensor.requires_grad] if optimizer is not None else []
        self._whole = _WholeStep(layers, [_Held(self._learnt)], observations)
        self._step: int | None = None
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._iterations: torch.Tensor | None = None
        self._lr: torch.Tensor | None = None

    @unseen
    @torch.no_grad()
    def attach(self, step: int) -> None:
        """A recorded step begins."""
        self._step = step
        if self._optimizer is None:
            return
        self._whole.begin()
        self._before = {tensor: tensor.detach().clone() for tensor in self._learnt}
        self._iterations = _iterations(self._optimizer).detach().clone()
        lr = torch.as_tensor(getattr(self._optimizer.learning_rate, "value", self._optimizer.learning_rate))
        lr = lr.detach().clone()
        self._lr = lr if self._lr is None else torch.maximum(self._lr, lr)

    @unseen
    @torch.no_grad()
    def end_step(self) -> None:
        """It is over."""
        if self._step is None or self._optimizer is None:
            return
        assert self._iterations is not None
        skipped = (_iterations(self._optimizer) == self._iterations).float()
        for tensor, before in self._before.items():
            sites = [site._replace(role=Role.UPDATE) for site in self._owners[tensor]]
            self._observations.reduce_update(self._step, sites, before, tensor.detach())
            self._observations.drop_updates_if(self._step, sites, skipped)
        for tensor, key, values in self._states():
            slot = self._observations.reduce(values)
            for site in self._owners[tensor]:
                state = Site(site.module, Role.STATE, 0, f"{site.tensor}.{key}")
                self._observations.link(self._step, state, slot)
        self._whole.end(self._step)
        self._before.clear()

    def detach(self) -> None:
        """Drop the copies."""
        self._before.clear()
        self._step = None

    def forget(self) -> None:
        """The run goes back."""
        self._whole.forget()

    def describe(self) -> list[dict[str, Any]]:
        """For run.json, with torch's words for the settings that advice reads."""
        if self._optimizer is None:
            return []
        config = self._optimizer.get_config()
        group: dict[str, Any] = {"lr": float(self._lr) if self._lr is not None else 0.0}
        for ours, theirs in (("eps", "epsilon"), ("weight_decay", "weight_decay"), ("momentum", "momentum")):
            if config.get(theirs) is not None:
                group[ours] = float(config[theirs])
        if "beta_1" in config and "beta_2" in config:
            group["betas"] = [config["beta_1"], config["beta_2"]]
        group["decoupled_weight_decay"] = True  # Keras takes lr * weight_decay of the variable off, with any optimizer
        group["parameters"] = [
            ".".join(filter(None, (s[0].module, s[0].tensor))) for s in map(self._owners.get, self._learnt)
        ]
        return [{"class": type(self._optimizer).__name__, "groups": [group]}]

    def _states(self) -> Iterable[tuple[torch.Tensor, str, torch.Tensor]]:
        """(variable, key, values) of the optimizer's lists that go with its variables, one by one."""
        trained = [variable.value for variable in self._optimizer._trainable_variables]
        known = _STATES.get(type(self._optimizer).__name__, {})
        for attribute, items in vars(self._optimizer).items():
            if attribute == "_trainable_variables" or not isinstance(items, list) or len(items) != len(trained):
                continue
            for tensor, item in zip(trained, items, strict=True):
                value = getattr(item, "value", None)
                values = dense(value) if isinstance(value, torch.Tensor) and value.dim() > 0 else None
                if values is not None and tensor in self._owners:
                    yield tensor, known.get(attribute, attribute.strip("_")), values


class _Held:
    """Stands for an optimizer: who holds which tensors."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.param_groups = [{"params": tensors}]


class _WholeStep(WholeStep):
    def __init__(self, layers: KerasLayers, held: list[Any], observations: Observations) -> None:
        super().__init__({}, held, observations)
        self._places = [
            (site._replace(role=Role.UPDATE), tensor) for tensor, sites in layers.owners().items() for site in sites[:1]
        ]

    def _tensors(self) -> Iterable[tuple[Site, torch.Tensor]]:
        return self._places


def _inner(optimizer: Any) -> Any:
    """The optimizer inside a LossScaleOptimizer."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _iterations(optimizer: Any) -> torch.Tensor:
    """How many steps it has done: a variable's tensor, or, where gradients are accumulated, one that was reckoned."""
    counted = optimizer.iterations
    return counted if isinstance(counted, torch.Tensor) else counted.value


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for x in output if isinstance(x, torch.Tensor)] if isinstance(output, tuple | list) else []


def _policies(layers: KerasLayers) -> dict[str, list[str]]:
    """Name -> [compute dtype, variable dtype]."""
    return {
        name: [layer.compute_dtype, layer.variable_dtype]
        for layer, name in layers.names.items()
        if hasattr(layer, "compute_dtype")
    }


def _precision(layers: KerasLayers) -> dict[str, str]:
    """The format that every layer computes in; "plan" where they differ."""
    found = {compute for compute, _ in _policies(layers).values()} & set(_FORMATS)
    return {"precision": _FORMATS[found.pop()] if len(found) == 1 else "plan"}
