"""Accelerate's loops: what `prepare` wraps is recorded as it is, and a plan is in force inside `planned`."""

from __future__ import annotations

import contextlib
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_distributed import rows
from torch.optim.optimizer import _global_optimizer_pre_hooks

import precscope as ps
from precscope.errors import PlanError, UsageError

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports where it is installed
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from precscope.integrations.accelerate import check_mixed_precision, planned

STEPS, MICRO = 6, 2
PLAN = ps.PrecisionPlan(default="bf16", modules={"1": "fp32"})
HALF = ps.PrecisionPlan(default="fp16", modules={"1": "fp32"}, loss_scale={"initial": 4096.0, "growth_interval": 4})


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 4)]
    model = torch.nn.Sequential(*layers)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def with_accelerate(out=None, plan=None, mixed_precision="no") -> list[torch.Tensor]:
    """The loop of Accelerate's documentation. -> losses, and the parameters at the end"""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, mixed_precision=mixed_precision)
    inner, optimizer = build()
    scheduler, losses = schedule(optimizer), []
    with planned(accelerator, plan, inner) if plan is not None else contextlib.nullcontext():
        model, optimizer, scheduler = accelerator.prepare(inner, optimizer, scheduler)
        recording = ps.record(model, out, optimizer=optimizer, scaler=accelerator.scaler, every=2) if out else None
        with recording or contextlib.nullcontext() as rec:
            for index in range(STEPS * MICRO):
                x, y = batch(index)
                with accelerator.accumulate(model):
                    output = model(x)
                    assert output.dtype is torch.float32
                    loss = F.cross_entropy(output, y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
                if rec is not None and accelerator.sync_gradients:
                    rec.step()
    return [*losses, *(p.detach() for p in inner.parameters())]


def by_hand(out, context, scaler=None) -> list[torch.Tensor]:
    """The same without Accelerate."""
    model, optimizer = build()
    scheduler, losses = schedule(optimizer), []
    with ps.record(model, out, optimizer=optimizer, scaler=scaler, every=2) as rec:
        for step in range(STEPS):
            for micro in range(MICRO):
                x, y = batch(step * MICRO + micro)
                with context(model):
                    output = model(x)
                loss = F.cross_entropy(output.float(), y)
                losses.append(loss.detach())
                (scaler.scale(loss / MICRO) if scaler else loss / MICRO).backward()
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            (scaler or optimizer).step(*([optimizer] if scaler else []))
            if scaler:
                scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            rec.step()
    return [*losses, *(p.detach() for p in model.parameters())]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def equal_rows(a, b) -> bool:
    """Every row but those of the model's own output, which Accelerate casts up inside it."""
    ours, theirs = rows(ps.Profile.load(a)), rows(ps.Profile.load(b))
    own = {k for k in ours.keys() | theirs.keys() if k[1] == "" and k[2] in ("output", "grad_output")}
    assert ours.keys() - own == theirs.keys() - own
    return all(
        str(ours[k][0]) == str(theirs[k][0]) and np.array_equal(ours[k][1], theirs[k][1]) for k in ours.keys() - own
    )


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_wrapped_objects_are_recorded_as_they_are(tmp_path, mixed_precision):
    def context(model):
        return torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16")

    watched = with_accelerate(tmp_path / "a", mixed_precision=mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same(watched, with_accelerate(mixed_precision=mixed_precision))
    assert same(watched, by_hand(tmp_path / "b", context))
    assert equal_rows(tmp_path / "a", tmp_path / "b")
    run = ps.Profile.load(tmp_path / "a").run
    assert run["recorded_steps"] == 3 and run["optimizers"][0]["class"] == "AdamW"


@pytest.mark.parametrize(("plan", "mixed_precision"), [(PLAN, "no"), (PLAN, "bf16"), (HALF, "no")])
def test_a_plan_decides(tmp_path, plan, mixed_precision):
    """As in a loop by hand, bit for bit; with fp16 in it, with a loss scale, unscaled before clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=4) if plan is HALF else None
    trained = with_accelerate(tmp_path / "a", plan, mixed_precision)
    assert same(trained, by_hand(tmp_path / "b", lambda model: ps.apply(plan, model), scaler))
    assert equal_rows(tmp_path / "a", tmp_path / "b")
    history = ps.Profile.load(tmp_path / "a").history()
    outputs = history[history.role == "output"].groupby("module", observed=True).source.unique()
    assert [list(outputs[name]) for name in "013"] == [[plan.default.compute], ["fp32"], [plan.default.compute]]
    if plan is HALF:
        gradients = history[history.role == "grad_weight"].groupby("step").loss_scale.first()
        assert gradients.tolist() == [4096.0, 4096.0, 8192.0]


def test_an_overflow_skips_the_step_and_its_schedule():
    accelerator = Accelerator(cpu=True)
    model, optimizer = build()
    before = [p.detach().clone() for p in model.parameters()]
    plan = HALF.replace(loss_scale={"initial": 2.0**60})
    with planned(accelerator, plan, model):
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, schedule(optimizer))
        accelerator.backward(model(batch(0)[0]).sum())
        accelerator.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        assert accelerator.optimizer_step_was_skipped and accelerator.scaler.get_scale() == 2.0**59
    assert same(before, [p.detach() for p in model.parameters()])


def test_afterwards_everything_is_as_before(tmp_path):
    """Also after an error; the model can be prepared again, and runs under Accelerate's own autocast then."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inner, optimizer = build()
    before = dict(vars(inner))
    plan = ps.PrecisionPlan.uniform("bf16", policy="cast", params="bf16")
    with pytest.raises(KeyError), planned(accelerator, plan.save(tmp_path / "plan.json"), inner) as handle:
        model, optimizer = accelerator.prepare(inner, optimizer)
        assert inner[0].weight.dtype is torch.bfloat16 and "bf16" in handle.describe()
        accelerator.backward(model(batch(0)[0]).sum())
        optimizer.step()
        raise KeyError
    assert vars(inner) == before and not accelerator._models and "unscale_gradients" not in vars(accelerator)
    assert {p.dtype for p in inner.parameters()} == {torch.float32}
    assert accelerator.native_amp and accelerator.scaler is None
    model, optimizer = accelerator.prepare(inner, optimizer)
    with ps.record(model, tmp_path / "a", optimizer=optimizer, every=1) as rec:
        optimizer.zero_grad()
        accelerator.backward(model(batch(0)[0]).sum())
        optimizer.step()
        rec.step()
    history = ps.Profile.load(tmp_path / "a").history()
    assert set(history.query("module == '0' and role == 'output'").source) == {"bf16"}
    assert set(history.query("role == 'state'").source) == {"fp32"}


STORED = ps.PrecisionPlan.uniform("bf16", policy="cast", params="bf16")


@pytest.mark.parametrize("prepared", [True, False])
def test_trained_weights_are_those_that_training_saw(prepared):
    """Where no step changed a stored value, the rounded one stays all the same; a model that is only used is whole."""
    accelerator = Accelerator(cpu=True)
    inner, _ = build()
    judge, _ = build()
    inner[3].requires_grad_(False)
    before = [p.detach().clone() for p in inner.parameters()]
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.0)
    with planned(accelerator, STORED, judge), planned(accelerator, STORED, inner):
        if prepared:
            model, optimizer, used = accelerator.prepare(inner, optimizer, judge)
        else:
            model, used = accelerator.prepare(inner, judge)
        for _ in range(2):
            accelerator.backward(F.cross_entropy(model(batch(0)[0]), batch(0)[1]) + used(batch(0)[0]).sum())
            optimizer.step()
            inner[3].requires_grad_()
    assert same([p.detach() for p in inner.parameters()], [p.bfloat16().float() for p in before])
    assert same([p.detach() for p in judge.parameters()], before)
    assert not _global_optimizer_pre_hooks


def test_two_models_with_plans_and_one_accelerator():
    accelerator = Accelerator(cpu=True)
    (a, _), (b, _) = build(), build()
    with planned(accelerator, HALF, a):
        outer = accelerator.unscale_gradients
        with planned(accelerator, PLAN, b):
            assert accelerator.scaler is None
        assert accelerator.unscale_gradients == outer and accelerator.scaler is not None
    assert "unscale_gradients" not in vars(accelerator) and accelerator.scaler is None


def test_an_error_in_setting_up_is_the_one_that_is_told():
    """An optimizer that refuses the loss scale: everything that was done until then is undone."""

    class Refusing(torch.optim.SGD):
        refuses = False

        def __getattribute__(self, name):
            if name == "step" and object.__getattribute__(self, "refuses"):
                raise KeyError("no scale for me")
            return super().__getattribute__(name)

    accelerator = Accelerator(cpu=True)
    inner, _ = build()
    before = dict(vars(inner))
    optimizer = Refusing(inner.parameters(), lr=0.1)
    accelerator.prepare(optimizer)
    optimizer.refuses = True
    with pytest.raises(KeyError, match="no scale for me"), planned(accelerator, HALF, inner):
        pass
    assert not any("forward" in vars(module) for module in inner.modules()) and vars(inner).keys() == before.keys()
    assert not inner._forward_hooks
    assert accelerator.scaler is None and accelerator._optimizers[0].scaler is None
    assert not _global_optimizer_pre_hooks


def test_no_plan_has_fp8_by_that_name():
    with pytest.raises(UsageError, match="asks for fp8, and the plan computes in bf16, fp32 only") as told:
        check_mixed_precision("fp8", {"bf16", "fp32"}, said="mixed_precision='fp8'")
    assert str(told.value).endswith("leave mixed_precision='fp8' out")


def test_a_prepared_model_is_refused():
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(*build())
    message = r"this model has been through accelerator.prepare: enter planned\(accelerator, plan, model\) first"
    with pytest.raises(UsageError, match=message), planned(accelerator, PLAN, model):
        pass


@pytest.mark.parametrize(
    ("mixed_precision", "plan", "message"),
    [
        ("bf16", HALF, "mixed_precision='bf16' asks for bf16, and the plan computes in fp16, fp32 only"),
        ("fp16", PLAN, "mixed_precision='fp16' asks for fp16, and the plan computes in bf16, fp32 only"),
        ("no", PLAN.replace(phases=[{"from_step": 1, "precision": "fp32"}]), "this plan has phases"),
        ("no", "nowhere.json", "nowhere.json"),
        ("no", ps.PrecisionPlan(modules={"7": "bf16"}), "7"),
    ],
)
def test_mistakes_are_told(mixed_precision, plan, message):
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, _ = build()
    with pytest.raises((UsageError, PlanError), match=message), planned(accelerator, plan, model):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def test_engines_with_a_precision_of_their_own_are_refused():
    """DeepSpeed and FSDP need several GPUs: only what is asked of the accelerator is there."""
    deepspeed = SimpleNamespace(distributed_type=SimpleNamespace(name="DEEPSPEED"), device=torch.device("cpu"))
    with pytest.raises(UsageError, match="under DEEPSPEED, which sets the precision itself"):
        with planned(deepspeed, PLAN, build()[0]):
            pass
