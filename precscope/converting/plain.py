"""The code that a snippet holds: plain PyTorch, nothing of precscope. `snippet` writes it to a file behind a plan's own
DEFAULT, PLAN, LOOKUPS and LOSS_SCALE, and leaves out what lies between `# [word]` and `# [/word]` where a plan needs no
`word`. What it computes is what ps.apply computes, bit for bit; tests hold the two together."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections import UserDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# [code]
# [plan]
DEFAULT: tuple[str, str, str] = ("fp32", "autocast", "fp32")
PLAN: dict[str, tuple[str, str, str]] = {}
LOOKUPS: frozenset[str] = frozenset()
LOSS_SCALE: dict[str, float] = {}
# [/plan]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def apply_plan(model: nn.Module) -> nn.Module:
    """Make `model` run as the plan says, in place; returns it. Call it once, on the model as it was built: before the
    optimizer is made, and before torch.compile or DDP. Classes, parameters' names and state_dict keys stay."""
    modules = dict(model.named_modules())
    if unknown := [name for name in PLAN if name not in modules]:
        raise ValueError(f"the plan was made for another model: this one has no {', '.join(unknown[:3])}")
    runs = {module: Run(*_entry(name), lookup=name in LOOKUPS) for name, module in modules.items()}
    # [storage]
    _store(runs)
    unlike = {module for module, run in runs.items() if run.is_unlike(module) and not run.lookup}
    for module, run in runs.items():
        run.unlike = [m for m in module.modules() if m in unlike and runs[m].key == run.key]
    # [/storage]
    now = Now()
    for module, run in runs.items():
        if isinstance(module, torch.jit.ScriptModule) or not _has_forward(module):
            continue
        own = module.forward
        planned = functools.partial(_planned_forward, module, own, run, now)
        with contextlib.suppress(TypeError, ValueError):
            planned.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        module.forward = planned
    return model


def loss_context(device_type: str = "cpu") -> contextlib.AbstractContextManager[Any]:
    """For code outside the model, mostly the loss: autocast where the plan's default is a 16-bit format."""
    if DEFAULT[0] == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=DTYPES[DEFAULT[0]])


# [scaler]
class Scaler(torch.amp.GradScaler):
    """A GradScaler with the plan's initial scale, growth interval and floor.

    scaler.scale(loss).backward(); scaler.unscale_(optimizer); ...clip...; scaler.step(optimizer); scaler.update()
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__(
            device_type, init_scale=LOSS_SCALE["initial"], growth_interval=int(LOSS_SCALE["growth_interval"])
        )

    def update(self, new_scale: Any = None) -> None:
        super().update(new_scale)
        if self._scale is not None:
            self._scale.clamp_(min=LOSS_SCALE["floor"])

    # [half]
    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        """Gradients of parameters that the plan stores in fp16 are unscaled in fp16."""
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)

    # [/half]


# [/scaler]
class Now:
    """Which module's way of running is in force: that of the innermost one that runs. None outside the model."""

    run: Run | None = None


@dataclasses.dataclass(eq=False)
class Run:
    """How one module runs. compute: fp32, bf16 or fp16. policy: "autocast" (PyTorch's lists decide inside) or "cast"
    (all in `compute`). stored: format of its parameters. lookup: an embedding whose rows are cast, not its table.
    unlike: modules in it, of its own precision, whose tensors are not stored as they are computed with."""

    compute: str
    policy: str
    stored: str
    lookup: bool = False
    unlike: list[nn.Module] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """Modules of equal key that call each other run as one."""
        return self.compute, self.policy, self.stored

    @property
    def kind(self) -> str:
        return "fp32" if self.compute == "fp32" else self.policy

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute]

    # [storage]
    @property
    def seen(self) -> torch.dtype:
        """The dtype in which the forward sees tensors."""
        return self.dtype if self.kind == "cast" else torch.float32

    def differs(self, tensor: Tensor) -> bool:
        """Whether the forward must see a cast of this tensor."""
        if tensor.dtype is torch.float64:
            return self.kind == "cast"
        return tensor.dtype in DTYPES.values() and tensor.dtype is not self.seen

    def is_unlike(self, module: nn.Module) -> bool:
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors = [t for t in tensors if t.is_floating_point()]
        if self.kind == "cast":  # batch norms take low inputs with fp32 parameters and statistics
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            return not (norm and all(t.dtype is torch.float32 for t in tensors)) and any(map(self.differs, tensors))
        product = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"
        if self.kind == "autocast" and (self.stored == "fp32" or (product and self.stored == self.compute)):
            return False  # autocast casts what it needs
        return any(map(self.differs, tensors))

    # [/storage]

    def take(self, tensor: Tensor) -> Tensor:
        """A tensor as the module takes it."""
        if not tensor.is_floating_point() or tensor.dtype is self.dtype:
            return tensor
        if self.kind == "cast":
            return tensor.to(self.dtype)
        return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _planned_forward(module: nn.Module, own: Any, run: Run, now: Now, /, *args: Any, **kwargs: Any) -> Any:
    """What runs instead of the module's own forward."""
    around = now.run
    if around is not None and around.key == run.key:  # part of what runs already
        if run.kind == "autocast":
            return own(*args, **kwargs)
        return _run(module, own, run, args, kwargs)
    now.run = run
    try:
        with _switched(run, _device_type(module, args, kwargs), now):
            output = _run(module, own, run, args, kwargs)
    finally:
        now.run = around
    if around is not None and around.kind == "cast" and type(module).__name__ == "ParametrizationList":
        return _mapped(output, around.take)  # a weight: what multiplies with it runs in that dtype alone
    if around is None or run.kind == "fp32":
        return output
    if around.kind == "fp32":
        return _mapped(output, _up)  # the code of an fp32 module is not under autocast: it cannot mix dtypes
    if around.kind == "autocast" and around.dtype is not run.dtype:
        return _mapped(output, around.take)  # nor can autocast mix its dtype with another
    return output


@contextlib.contextmanager
def _switched(run: Run, device: str, now: Now) -> Any:
    """Autocast as the module wants it."""
    enabled = torch.is_autocast_enabled(device)
    with contextlib.ExitStack() as stack:
        # [attention]
        if _attends(run) and device == "cpu":
            stack.enter_context(LowAttention(now))
        # [/attention]
        if run.kind == "autocast":
            if not enabled or torch.get_autocast_dtype(device) != run.dtype:
                stack.enter_context(torch.autocast(device, dtype=run.dtype))
        elif enabled:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _run(module: nn.Module, own: Any, run: Run, args: tuple, kwargs: dict) -> Any:
    args, kwargs = _mapped(args, run.take), _mapped(kwargs, run.take)
    if run.lookup:
        return _mapped(own(*args, **kwargs), run.take)
    # [storage]
    unlike = run.unlike
    if not unlike and run.kind == "cast" and not run.lookup and run.is_unlike(module):
        unlike = [module]  # converted by the model itself since
    if unlike:
        with _cast_tensors(unlike, run, training=module.training):
            return own(*args, **kwargs)
    # [/storage]
    return own(*args, **kwargs)


def _up(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _mapped(value: Any, change: Any) -> Any:
    """`value` with `change` made to every tensor in it; the same object where none changes."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    keys = value.keys() if isinstance(value, (dict, UserDict)) else ()
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else ()
    new = {key: (_mapped(value[key], change), value[key]) for key in keys} or {
        field.name: (_mapped(getattr(value, field.name, None), change), getattr(value, field.name, None))
        for field in fields
    }
    if all(after is before for after, before in new.values()):
        return value
    value = copy.copy(value)
    for key, (after, _) in new.items():
        value.__setitem__(key, after) if keys else object.__setattr__(value, key, after)
    return value


def _device_type(module: nn.Module, args: tuple, kwargs: dict) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            return value.device.type
    return next((p.device.type for p in module.parameters() if p.device.type != "meta"), "cpu")


def _has_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _entry(name: str) -> tuple[str, str, str]:
    """The entry of the module or of its nearest parent, else DEFAULT."""
    while name not in PLAN:
        if not name:
            return DEFAULT
        name = name.rpartition(".")[0]
    return PLAN[name]


# [storage]
def _store(runs: dict[nn.Module, Run]) -> None:
    """Convert parameters, and buffers under "cast", to the dtype they are stored in; shared ones to the widest."""
    asked: dict[int, tuple[Tensor, set[str]]] = {}
    for module, run in runs.items():
        for tensor in (*module._parameters.values(), *(module._buffers.values() if run.kind == "cast" else ())):
            if tensor is not None and tensor.dtype in DTYPES.values():
                asked.setdefault(id(tensor), (tensor, set()))[1].add(run.stored)
    for tensor, formats in asked.values():
        tensor.data = tensor.data.to(DTYPES[formats.pop() if len(formats) == 1 else "fp32"])


@contextlib.contextmanager
def _cast_tensors(modules: list[nn.Module], run: Run, *, training: bool) -> Any:
    """While a forward runs: casts in place of tensors that are stored in another dtype; what it writes is kept."""
    swapped = []
    try:
        for module in modules:
            for table in (module._parameters, module._buffers):
                for name, stored in list(table.items()):
                    if stored is not None and run.differs(stored):
                        seen = stored.to(run.seen)
                        swapped.append((table, name, stored, seen, None if seen.is_inference() else seen._version))
                        table[name] = seen
            _refresh(module)
        yield
    finally:
        for table, name, stored, seen, version in reversed(swapped):
            now = table.get(name)
            if now is not seen:  # assigned anew
                table[name] = now if now is None or isinstance(now, nn.Parameter) else now.to(stored.dtype)
                continue
            table[name] = stored
            written = version is not None and seen._version > version
            if not written and not isinstance(stored, nn.Parameter) and (training or version is None):
                written = not torch.equal(seen, stored.to(seen.dtype))
            if written:
                with torch.no_grad():
                    same = seen == stored.to(seen.dtype)
                    stored.copy_(torch.where(same, stored, seen.to(stored.dtype)))
        for module in modules:
            _refresh(module)


def _refresh(module: nn.Module) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


# [/storage]
# [attention]
MOST_KEYS = 512


def _attends(run: Run) -> bool:
    """Under "cast" in bf16 with fp32 parameters, attention on CPUs with few keys is computed in bf16 throughout, which
    is faster there than PyTorch's fused kernel."""
    return run.key == ("bf16", "cast", "fp32")


class LowAttention(TorchFunctionMode):
    def __init__(self, now: Now) -> None:
        super().__init__()
        self.now = now

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        wanted = func is F.scaled_dot_product_attention and self.now.run is not None and _attends(self.now.run)
        if wanted and _suits(*args, **(kwargs or {})):
            return attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


# [attention functions]
from ..applying.attention import _suits, attend  # noqa: E402

# [/attention functions]
# [/attention]
