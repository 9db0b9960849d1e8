"""Lightning: a Trainer's fit recorded and planned equals the plain loop, bit for bit; Fabric with a plan."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import precscope as ps
from precscope.errors import PlanError, UsageError
from precscope.sites import Role

lightning = pytest.importorskip("lightning")

from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision  # noqa: E402

from precscope.integrations.lightning import FabricPlanPrecision, PlanPrecision, RecordCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

EPS = 1e-4  # which fp16 has, for "16-true"
BATCHES = [models.batch(step) for step in range(8)]
VALIDATION = [models.batch(100 + step, size=32) for step in range(2)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), nn.Dropout(0.1)
    )


def loader(batches):
    return DataLoader(batches, batch_size=None)


class Lit(LightningModule):
    """seen: names of what ran, for the tests."""

    def __init__(self, inner=None):
        super().__init__()
        self.net = inner or net()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2, eps=EPS)


def fit(model=None, *, callbacks=(), epochs=1, validate=False, ckpt=None, seed=7, batches=None, **options):
    model = Lit() if model is None else model
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, barebones=False, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    trainer.fit(model, loader(batches or BATCHES), loader(VALIDATION) if validate else None, ckpt_path=ckpt)
    return model, trainer


def half_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=2)


PRECISIONS = {
    "32-true": Precision,
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "16-mixed": lambda: MixedPrecision("16-mixed", "cpu", half_scaler()),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
}


def plain(out, precision="32-true", *, plan=None, accumulate=1, clip=None, scaler=None):
    """The same training by hand. Returns losses and the model."""
    model = net()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    low = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    model.to(low)
    with contextlib.ExitStack() as stack:
        handle = None if plan is None else stack.enter_context(ps.apply(plan, model))
        if handle is not None:
            handle.settle()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
        scaler = scaler or (half_scaler() if dtype is torch.float16 else torch.amp.GradScaler("cpu", enabled=False))
        around = (lambda: torch.autocast("cpu", dtype=dtype)) if dtype else contextlib.nullcontext
        losses = []
        torch.manual_seed(7)
        with ps.record(model, out, optimizer=optimizer, scaler=scaler, every=1) as rec:
            for index, (x, y) in enumerate(loader(BATCHES)):
                with handle.autocast() if handle else around():
                    loss = F.cross_entropy(model(x.to(low)), y)
                losses.append(loss.detach().clone())
                scaler.scale(loss / accumulate).backward()
                if (index + 1) % accumulate == 0:
                    if clip is not None:
                        scaler.unscale_(optimizer)
                        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    rec.step()
    return losses, model


def table_of(path):
    profile = ps.Profile.load(path)
    return profile, {site: profile.table.row(i) for i, site in enumerate(profile.sites)}


def same_run(a, b):
    (first, rows), (second, others) = table_of(a), table_of(b)
    assert first.steps == second.steps
    assert set(rows) == set(others)
    for site, row in rows.items():
        assert row == others[site], site
    columns = ["step", "module", "role", "call", "tensor"]
    scales = [p.history().sort_values(columns).loss_scale.to_numpy() for p in (first, second)]
    assert np.array_equal(*scales)


def same_weights(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# recording


@pytest.mark.parametrize("accumulate,clip", [(1, None), (2, 0.5)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_statistics_are_those_of_the_plain_loop(tmp_path, precision, accumulate, clip):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    losses, by_hand = plain(tmp_path / "plain", precision, accumulate=accumulate, clip=clip)
    callback = RecordCallback(tmp_path / "lit", every=1, module="net")
    watched, trainer = fit(callbacks=[callback], plugins=[PRECISIONS[precision]()], validate=True, **options)
    alone, _ = fit(plugins=[PRECISIONS[precision]()], validate=True, **options)
    assert same_weights(watched, alone) and same_weights(watched.net, by_hand)
    assert torch.equal(torch.stack(watched.losses), torch.stack(losses))
    assert torch.equal(torch.stack(watched.losses), torch.stack(alone.losses))
    same_run(tmp_path / "plain", tmp_path / "lit")
    run = ps.Profile.load(tmp_path / "lit").run
    words = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
    assert run["precision"] == words.get(precision, precision) and run["status"] == "done"
    assert run["accumulate"] == accumulate and callback.recorder is None and trainer.global_step == 8 // accumulate


def test_the_whole_lightning_module_is_recorded_by_default(tmp_path):
    plain(tmp_path / "plain")
    fit(callbacks=[RecordCallback(tmp_path / "lit", every=1)])
    _, rows = table_of(tmp_path / "plain")
    profile, own = table_of(tmp_path / "lit")
    inside = {site: row for site, row in own.items() if site.module not in ("", "net")}
    assert {s.module for s in own} >= {"net.0", "net.2.1"}
    assert len(inside) == sum(site.module != "" for site in rows)
    for site, row in inside.items():
        assert row == rows[site._replace(module=site.module.removeprefix("net."))], site
    assert {m["name"]: m["calls"] for m in profile.graph["modules"]}["net.0"] == 1


def test_every_and_the_steps_of_several_epochs(tmp_path):
    fit(callbacks=[RecordCallback(tmp_path / "a", every=5)], epochs=3, accumulate_grad_batches=3, validate=True)
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.steps == [0, 5]  # of 9: an epoch of 8 batches ends in a step of 2
    outputs = profile.history().query("module == 'net.0' and role == 'output'")
    assert outputs["count"].tolist() == [3 * 6 * 16, 2 * 6 * 16]


class Adversaries(LightningModule):
    """Manual optimization, two optimizers in turns, each with the other's parameters frozen."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.g, self.d = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 1)
        self.losses = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.g.parameters(), lr=1e-2), torch.optim.SGD(self.d.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        of_g, of_d = self.optimizers()
        self.turn(of_d, self.loss_of_d, batch[0])
        self.turn(of_g, self.loss_of_g, batch[0])

    def turn(self, optimizer, loss_of, x):
        self.toggle_optimizer(optimizer)
        loss = loss_of(x)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        self.losses.append(loss.detach().clone())

    def loss_of_d(self, x):
        return F.softplus(-self.d(x)).mean() + F.softplus(self.d(self.g(x.flip(0)).detach())).mean()

    def loss_of_g(self, x):
        return F.softplus(-self.d(self.g(x.flip(0)))).mean()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "plan"])
def test_manual_optimization_with_two_optimizers(tmp_path, precision):
    def plugin():
        plan = ps.PrecisionPlan(default="bf16", modules={"d": "fp32"})
        return PlanPrecision(plan) if precision == "plan" else PRECISIONS[precision]()

    watched, trainer = fit(Adversaries(), callbacks=[RecordCallback(tmp_path / "a", every=1)], plugins=[plugin()])
    alone, _ = fit(Adversaries(), plugins=[plugin()])
    assert same_weights(watched, alone)
    assert torch.equal(torch.stack(watched.losses), torch.stack(alone.losses))
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.steps == list(range(8)) and trainer.global_step == 16  # Lightning counts both optimizers
    assert [o["class"] for o in profile.run["optimizers"]] == ["Adam", "SGD"]
    sites, table = profile.merged(by="module")
    counts = {(s.module, s.role): table.row(i).count for i, s in enumerate(sites)}
    assert counts["d", Role.OUTPUT] == 8 * 3 * 6 and counts["g.0", Role.OUTPUT] == 8 * 2 * 6 * 16
    assert counts["d", Role.GRAD_WEIGHT] == counts["d", Role.WEIGHT] == 8 * (8 + 1)


def test_casts_kept_by_autocast_are_not_outdated_in_manual_optimization():
    """Weights that change within a training_step are cast anew: as if each pass were in an autocast of its own."""

    class Twice(Lit):
        def __init__(self):
            super().__init__(nn.Linear(8, 4))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in range(2):
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.5)

    torch.manual_seed(0)
    model, _ = fit(Twice(), plugins=[PlanPrecision(ps.PrecisionPlan(default="bf16"))])
    torch.manual_seed(0)
    by_hand = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    with ps.apply(ps.PrecisionPlan(default="bf16"), by_hand) as handle:
        for x, y in BATCHES:
            for _ in range(2):
                with handle.autocast():
                    loss = F.cross_entropy(by_hand(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert same_weights(model.net, by_hand)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_fit_goes_on_with_the_directory(tmp_path, precision):
    def checkpoints():
        return ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=3, filename="{step}")

    def options(out):
        callbacks = [RecordCallback(out, every=1, module="net"), checkpoints()]
        return {"callbacks": callbacks, "plugins": [PRECISIONS[precision]()], "enable_checkpointing": True}

    fit(**options(tmp_path / "whole"))

    class PowerCut(Exception):
        pass

    class Cut(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                raise PowerCut("on purpose")

    broken = options(tmp_path / "cut")
    broken["callbacks"].append(Cut())
    with pytest.raises(PowerCut):
        fit(**broken)
    whole, cut = ps.Profile.load(tmp_path / "whole"), ps.Profile.load(tmp_path / "cut")
    assert cut.run["status"] == "failed" and "PowerCut: on purpose" in cut.run["error"]
    assert cut.steps == [0, 1, 2, 3, 4]
    fit(ckpt=tmp_path / "ckpt" / "step=3.ckpt", **options(tmp_path / "cut"))
    again = ps.Profile.load(tmp_path / "cut")
    assert again.run["status"] == "done" and again.steps == list(range(8))
    weights = [p.history().query("role == 'weight' and step <= 3") for p in (whole, again)]
    assert len(weights[0]) and weights[0].equals(weights[1])  # Lightning restores no random states, hence not later
    assert len(again.history().query("step == 4 and module == '0' and role == 'output'")) == 1


def test_what_raises_leaves_nothing_behind(tmp_path):
    class Raises(Lit):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ZeroDivisionError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Raises()
    callback = RecordCallback(tmp_path / "a", every=1, flush_every=100)
    plan = ps.PrecisionPlan(default="bf16")
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[callback], plugins=[PlanPrecision(plan)])
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.steps == [0, 1, 2] and profile.run["status"] == "failed" and profile.run["precision"] == "plan"
    assert callback.recorder is None
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    with pytest.raises(UsageError, match="already holds a run"):
        fit(callbacks=[callback])
    fit(callbacks=[RecordCallback(tmp_path / "a", every=4, exist="overwrite")])
    assert ps.Profile.load(tmp_path / "a").steps == [0, 4]


def test_a_fit_that_is_called_again_goes_on(tmp_path):
    callback = RecordCallback(tmp_path / "a", every=3)
    model, trainer = fit(callbacks=[callback])
    assert ps.Profile.load(tmp_path / "a").steps == [0, 3, 6]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(BATCHES))
    assert ps.Profile.load(tmp_path / "a").steps == [0, 3, 6, 9, 12, 15]


def test_shadow_steps(tmp_path):
    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    callback = RecordCallback(tmp_path / "a", every=1, module="net", shadow_every=2, loss=loss)
    watched, _ = fit(callbacks=[callback], plugins=[PRECISIONS["16-mixed"]()], **options)
    alone, _ = fit(plugins=[PRECISIONS["16-mixed"]()], **options)
    assert same_weights(watched, alone)
    profile = ps.Profile.load(tmp_path / "a")
    truth = profile.truth
    assert sorted(set(truth.step)) == [0, 2]
    finite = truth[np.isfinite(truth.rel_error)]  # where nothing overflowed in the running step
    assert len(finite) >= 6 and finite.rel_error.max() < 0.01 and (finite.cosine > 0.99).all()
    assert (truth.loss_low - truth.loss_fp32).abs().max() < 0.02


def test_the_loss_scale_of_shadow_steps_stays_on_the_device(tmp_path):
    """GradScaler.get_scale would wait for the device."""

    class Waiting(torch.amp.GradScaler):
        def get_scale(self):
            raise AssertionError("waited for the device")

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1])

    callback = RecordCallback(tmp_path / "a", every=1, module="net", shadow_every=1, loss=loss)
    scaler = Waiting("cpu", init_scale=2.0**10, growth_interval=2)
    fit(callbacks=[callback], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    truth = ps.Profile.load(tmp_path / "a").truth
    assert len(set(truth.step)) == 8 and (truth.loss_low - truth.loss_fp32).abs().max() < 0.02


def test_mistakes_of_the_callback_are_told(tmp_path):
    with pytest.raises(UsageError, match="shadow steps need both.*without logging"):
        RecordCallback(tmp_path / "a", shadow_every=10)
    with pytest.raises(UsageError, match="Lit has no module 'nett'; it has.*net"):
        fit(callbacks=[RecordCallback(tmp_path / "a", module="nett")])


# plans


ISLANDS = ps.PrecisionPlan(default="bf16", modules={"2.0": "fp32"})
HALF = ps.PrecisionPlan(default="fp16", modules={"2.0": "fp32"}, loss_scale={"initial": 2.0**19, "growth_interval": 2})
STORED = ps.PrecisionPlan(default=ps.LayerPrecision("bf16", policy="cast", params="bf16"))
PLANS = {"islands": ISLANDS, "half": HALF, "stored": STORED}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_through_the_plugin_is_ps_apply(tmp_path, name):
    from precscope.training.precision import LossScaler

    plan = PLANS[name]
    scaler = LossScaler("cpu", init_scale=2.0**19, growth_interval=2) if name == "half" else None
    losses, by_hand = plain(tmp_path / "plain", plan=plan, accumulate=2, clip=0.5, scaler=scaler)
    precision = PlanPrecision(plan, module="net")
    assert (precision.scaler is not None) == (name == "half")
    callback = RecordCallback(tmp_path / "lit", every=1, module="net")
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "validate": True}
    watched, trainer = fit(callbacks=[callback], plugins=[precision], **options)
    alone, _ = fit(plugins=[PlanPrecision(plan, module="net")], **options)
    assert torch.equal(torch.stack(watched.losses), torch.stack(losses))
    assert same_weights(watched, alone) and same_weights(watched.net, by_hand)
    same_run(tmp_path / "plain", tmp_path / "lit")
    assert precision.handles == [] and ps.Profile.load(tmp_path / "lit").run["precision"] == "plan"
    unplanned, _ = fit(**options)
    assert not same_weights(watched, unplanned)
    if name == "half":
        assert ps.Profile.load(tmp_path / "lit").history().loss_scale.nunique() > 2  # 1, and the scale moves
        assert trainer.precision_plugin.scaler is precision.scaler


def test_weights_saved_are_plain_and_a_planned_fit_resumes(tmp_path):
    plan = ps.PrecisionPlan(default="fp16", modules={"net.2.*": "fp32"}, loss_scale={"initial": 2.0**10})

    def run(epochs, ckpt=None):
        every = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, filename="{epoch}")
        model = Lit(nn.Sequential(*net()[:3]))  # without dropout: Lightning restores no random states
        plugins = [PlanPrecision(plan)]
        return fit(model, callbacks=[every], epochs=epochs, ckpt=ckpt, enable_checkpointing=True, plugins=plugins)

    whole, trainer = run(2)
    saved = torch.load(tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    assert {x.dtype for x in saved["state_dict"].values()} == {torch.float32}
    assert saved["PlanPrecision"]["scale"] == 2.0**10
    plain_model = Lit(nn.Sequential(*net(seed=5)[:3]))
    plain_model.load_state_dict(saved["state_dict"])
    resumed, _ = run(2, tmp_path / "ckpt" / "epoch=0.ckpt")
    assert same_weights(resumed, whole)
    assert trainer.validate(whole, loader(VALIDATION), verbose=False) is not None  # the plan comes and goes again
    assert not any("forward" in vars(m) for m in whole.modules())


@pytest.mark.parametrize("unfreeze", [False, True])
def test_trained_weights_are_those_that_training_saw(unfreeze):
    """At lr 0 no stored value changes, and the rounded ones stay; validation alone leaves the weights as they were."""

    class Still(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.requires_grad_(True)

    before = [p.detach().clone() for p in net().parameters()]
    model = Still()
    if unfreeze:
        model.net[2].requires_grad_(False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=1, plugins=[PlanPrecision(STORED)])  # fmt: skip
    trainer.validate(model, loader(VALIDATION), verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), before, strict=True))
    trainer.fit(model, loader(BATCHES))
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(model.net.parameters(), before, strict=True))


def test_mistakes_of_plans_are_told(tmp_path):
    with pytest.raises(PlanError, match="plan must be a PrecisionPlan or the path of one, not dict"):
        PlanPrecision({"default": "bf16"})
    phased = ps.PrecisionPlan(phases=[{"from_step": 0, "precision": "fp16"}, {"from_step": 5, "precision": "fp32"}])
    with pytest.raises(PlanError, match="phases.*at_step"):
        PlanPrecision(phased)
    path = ps.PrecisionPlan(default="bf16", modules={"net.9": "fp32"}).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"net\.9"):
        fit(plugins=[PlanPrecision(path)])
    with pytest.raises(UsageError, match="for Fabric there is FabricPlanPrecision"):
        Fabric(accelerator="cpu", plugins=[PlanPrecision(ISLANDS)]).setup(net())


# Fabric


def fabric_loop(precision, *, out=None, clip=0.5):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    inner = net()
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(inner.parameters(), lr=1e-2, eps=EPS))
    losses = []
    torch.manual_seed(7)
    recorder = contextlib.nullcontext()
    if out is not None:
        recorder = ps.record(model, out, optimizer=optimizer, scaler=precision.scaler, every=1)
    with recorder as rec:
        for x, y in loader(BATCHES):
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.detach().clone())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if rec is not None:
                rec.step()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    precision.remove()
    return losses, inner, state


@pytest.mark.parametrize("name", PLANS)
def test_fabric_with_a_plan_is_ps_apply(tmp_path, name):
    from precscope.training.precision import LossScaler

    plan = PLANS[name]
    scaler = LossScaler("cpu", init_scale=2.0**19, growth_interval=2) if name == "half" else None
    expected, by_hand = plain(tmp_path / "plain", plan=plan, clip=0.5, scaler=scaler)
    losses, watched, state = fabric_loop(FabricPlanPrecision(plan), out=tmp_path / "fabric")
    _, alone, _ = fabric_loop(FabricPlanPrecision(plan))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert same_weights(watched, alone) and same_weights(watched, by_hand)
    assert list(state) == list(by_hand.state_dict())
    same_run(tmp_path / "plain", tmp_path / "fabric")
    assert not any("forward" in vars(m) for m in watched.modules())


def test_fabric_settles_what_is_trained():
    precision = FabricPlanPrecision(STORED)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    trained, used = net(), net()
    before = [p.detach().clone() for p in net().parameters()]
    model, optimizer = fabric.setup(trained, torch.optim.SGD(trained.parameters(), lr=0.0))
    judge = fabric.setup(used)
    fabric.backward(F.cross_entropy(judge(model(BATCHES[0][0]) @ torch.ones(4, 8)), BATCHES[0][1]))
    optimizer.step()
    assert len(precision.handles) == 2
    precision.remove()
    assert precision.handles == []
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(trained.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), before, strict=True))


# other ways


def test_pytorch_lightning_is_served_too(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    from precscope.integrations import pytorch_lightning as own

    assert issubclass(own.RecordCallback, pl.Callback) and not issubclass(own.RecordCallback, Callback)

    class Other(pl.LightningModule):
        training_step, configure_optimizers = Lit.training_step, Lit.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net, self.losses = net(), []

    plain(tmp_path / "plain", plan=ISLANDS, clip=0.5)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=0.5, plugins=[own.PlanPrecision(ISLANDS, module="net")],
        callbacks=[own.RecordCallback(tmp_path / "pl", every=1, module="net")],
    )  # fmt: skip
    torch.manual_seed(7)
    inner = Other()
    torch.manual_seed(7)
    trainer.fit(inner, loader(BATCHES))
    same_run(tmp_path / "plain", tmp_path / "pl")


SCRIPT = """
import sys, torch, torch.nn as nn, torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from precscope import PrecisionPlan
from precscope.integrations.lightning import PlanPrecision, RecordCallback

class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

if __name__ == "__main__":
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    plan = PrecisionPlan(default="bf16", modules={"net.2": "fp32"})
    record = RecordCallback(
        "run", every=1, shadow_every=2, loss=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]))
    Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, plugins=[PlanPrecision(plan)], callbacks=[record],
    ).fit(Lit(), DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=4))
"""


@pytest.mark.slow
def test_two_processes_are_merged(tmp_path):
    (tmp_path / "ddp.py").write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "ddp.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    profile = ps.Profile.load(tmp_path / "run")
    assert profile.run["merged_over"] == 2 and profile.run["precision"] == "plan" and profile.run["status"] == "done"
    outputs = profile.history().query("module == 'net.0' and role == 'output'")
    assert outputs["count"].tolist() == [2 * 4 * 16] * 4
    assert sorted(set(profile.truth.step)) == [0, 2] and (profile.truth.cosine > 0.99).all()


def test_a_missing_package_gives_one_sentence(monkeypatch):
    for name, package in (("lightning", "lightning"), ("pytorch_lightning", "pytorch-lightning")):
        monkeypatch.delitem(sys.modules, f"precscope.integrations.{name}", raising=False)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=rf'^{package} .*: pip install "precscope\[lightning\]"$'):
            importlib.import_module(f"precscope.integrations.{name}")
