"""Hugging Face Accelerate: loops around `accelerator.prepare`, with a recorder and with a plan.

Recording needs nothing of its own: `ps.record` looks through what `prepare` wraps.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with ps.record(model, "runs/a", optimizer=optimizer, scaler=accelerator.scaler) as rec:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(); scheduler.step(); optimizer.zero_grad()
            if accelerator.sync_gradients:
                rec.step()

A plan is in force in the block of `planned`, inside which `prepare` is called:

    with planned(accelerator, plan, model):
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        ...

Tested with accelerate 1.15.0, on the CPU, in one process and in two (gloo). There, Accelerate has neither autocast nor
a loss scale for mixed_precision="fp16": such a loop trains in fp32, but for a plan with fp16, which brings both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..applying import PlanHandle, apply
from ..errors import UsageError
from ..plans import PrecisionPlan
from ..training.precision import LossScaler
from .given_plan import read_plan
from .missing import need
from .replacing import replaced
from .settling import Settling

need("accelerate", "hf")

_OWN_PRECISION = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""Kinds of distributed training that bring a precision, or sharded parameters, of their own."""
_WITH = {"fp16": ("fp16",), "bf16": ("bf16", "e4m3", "e5m2")}
"""mixed_precision -> the formats of a plan that it goes with."""


@contextmanager
def planned(accelerator: Any, plan: PrecisionPlan | str | Path, model: nn.Module) -> Iterator[PlanHandle]:
    """Inside, `accelerator` trains `model` as `plan` says. Call `accelerator.prepare` inside, as often as before.

    The plan decides alone: Accelerate's own autocast (mixed_precision=) stays off, and its outputs are cast up to fp32
    as under that. Where the plan computes in fp16 anywhere, `accelerator.scaler` is a loss scaler with the plan's
    scale, which `backward`, `clip_grad_norm_` and the prepared optimizers use; else there is none. Afterwards model and
    accelerator are as before; prepare the model again to train on without the plan. Where the plan stores parameters in
    a lower format, a model that an optimizer has stepped is what was stored, cast up; one that was only used is exactly
    what it was.

    plan: a PrecisionPlan, or the path of one. Raises PlanError where the plan does not fit the model or has phases,
    UsageError where the model is prepared already, where mixed_precision names a format that the plan never computes
    in, and under DeepSpeed, FSDP, Megatron-LM and XLA.
    """
    plan = read_plan(plan)
    formats = _formats(plan, model)
    _check(accelerator, model, formats)
    scaler = LossScaler.of(plan, accelerator.device.type) if "fp16" in formats else None
    with ExitStack() as undo:  # in reverse order, as far as things were done
        with _optimizer_states_of(accelerator, model):
            settling = Settling(apply(plan, model))
            undo.callback(release, accelerator, model)
            undo.callback(_take_off, accelerator, settling)
        undo.callback(register_optimizer_step_pre_hook(settling.before_step).remove)
        undo.callback(model.register_forward_hook(_cast_up).remove)
        undo.enter_context(replaced(accelerator, "native_amp", False))
        undo.callback(_use_scaler, accelerator, accelerator.scaler)
        _use_scaler(accelerator, scaler)
        unscale = partial(_unscale, accelerator, scaler)
        undo.enter_context(replaced(accelerator, "unscale_gradients", unscale))
        yield settling.handle


def release(accelerator: Any, model: nn.Module) -> None:
    """Take off `model` what `prepare` has left on it, so that it can be prepared anew."""
    own = vars(model).pop("_original_forward", None)
    if own is not None:
        vars(model).pop("forward", None)
        if getattr(own, "__func__", None) is not type(model).forward:
            model.forward = own
    vars(model).pop("_is_accelerate_prepared", None)
    accelerator._models = [m for m in accelerator._models if accelerator.unwrap_model(m) is not model]


def _formats(plan: PrecisionPlan, model: nn.Module) -> set[str]:
    """What the plan computes in, in this model."""
    return {layer.compute for layer in plan.resolve(name for name, _ in model.named_modules()).values()}


def _check(accelerator: Any, model: nn.Module, formats: set[str]) -> None:
    kind = accelerator.distributed_type.name
    if kind in _OWN_PRECISION:
        raise UsageError(
            f"a plan cannot be used under {kind}, which sets the precision itself: use one process or DDP, "
            'or ps.train(strategy="fsdp"); precscope exports plans to DeepSpeed\'s settings'
        )
    if getattr(model, "_is_accelerate_prepared", False) or isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "this model has been through accelerator.prepare: enter planned(accelerator, plan, model) first, "
            "and prepare the model inside"
        )
    check_mixed_precision(accelerator.mixed_precision, formats, said=f"mixed_precision={accelerator.mixed_precision!r}")


def check_mixed_precision(mixed_precision: str, formats: set[str], *, said: str) -> None:
    """Whether a setting (`said` by the user) goes with a plan that computes in `formats`. Raises UsageError."""
    if mixed_precision == "no" or formats & set(_WITH.get(mixed_precision, ())):
        return
    other = f", or recommend a plan with {mixed_precision} among its formats" if mixed_precision in _WITH else ""
    raise UsageError(
        f"{said} asks for {mixed_precision}, and the plan computes in {', '.join(sorted(formats))} only. "
        f"The plan says the precision of every module: leave {said} out{other}"
    )


def _use_scaler(accelerator: Any, scaler: Any) -> None:
    """Give `scaler` to the accelerator and to the optimizers that it has prepared."""
    accelerator.scaler = scaler
    for optimizer in accelerator._optimizers:
        if optimizer.scaler is not scaler:
            optimizer.__setstate__({"scaler": scaler, "_is_overflow": False})  # which sets up its step for a scaler


@contextmanager
def _optimizer_states_of(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Where parameters are stored in another dtype afterwards, the prepared optimizers' states follow."""
    before = [p.dtype for p in model.parameters()]
    yield
    if before != [p.dtype for p in model.parameters()]:
        for optimizer in accelerator._optimizers:
            optimizer.load_state_dict(optimizer.state_dict())  # which casts to the parameters' dtypes


def _take_off(accelerator: Any, settling: Settling) -> None:
    with _optimizer_states_of(accelerator, settling.handle.model):
        settling.remove()


def _unscale(accelerator: Any, scaler: LossScaler | None, optimizer: Any = None) -> None:
    """`Accelerator.unscale_gradients`, which itself goes by mixed_precision="fp16"."""
    if scaler is None:
        return
    if optimizer is None:
        optimizer = accelerator._optimizers
    for one in optimizer if isinstance(optimizer, tuple | list) else [optimizer]:
        while isinstance(getattr(one, "optimizer", None), torch.optim.Optimizer):
            one = one.optimizer
        scaler.unscale_(one)


def _cast_up(module: nn.Module, args: Any, output: Any) -> Any:
    """16-bit tensors of the model's output in fp32: losses outside the model are computed as under Accelerate."""
    from accelerate.utils import convert_to_fp32

    return convert_to_fp32(output)
