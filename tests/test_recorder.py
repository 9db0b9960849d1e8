"""The recorder: what it sees is what passed, and the run does not notice."""

from __future__ import annotations

import contextlib
import json
import warnings

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precscope.errors import ModelError, RunDirectoryError, UsageError
from precscope.kernels import summarize
from precscope.profiles import Profile
from precscope.recording import record
from precscope.sites import Role, Site


def run(model, precision="fp32", *, steps=3, watch=None, accumulate=1, make_optimizer=None):
    """A plain loop as a user would write it; returns losses and parameters. watch: factory of a recorder."""
    torch.manual_seed(1)
    if make_optimizer is None:
        sparse = any(isinstance(m, nn.Embedding) and m.sparse for m in model.modules())
        make_optimizer = torch.optim.SGD if sparse else torch.optim.AdamW
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**12)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    losses = []
    with watch(model, optimizer, scaler) if watch else contextlib.nullcontext() as rec:
        for step in range(steps):
            for micro in range(accumulate):
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = models.loss_of(model, models.batch(step * accumulate + micro)) / accumulate
                scaler.scale(loss).backward()
                losses.append(loss.detach().clone())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if rec is not None:
                rec.step()
    return torch.stack(losses), [p.detach().clone() for p in model.parameters()]


def watched(out, **options):
    options = {"every": 1, **options}
    return lambda model, optimizer, scaler: record(model, out, optimizer=optimizer, scaler=scaler, **options)


def build(name):
    torch.manual_seed(0)
    return models.ALL[name]()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", models.ALL)
def test_watching_changes_nothing(tmp_path, name, precision):
    if precision == "fp16" and name in ("sparse", "lstm"):
        pytest.skip("torch has no fp16 LSTM on the CPU, and no unscaling of sparse CPU gradients")
    plain = run(build(name), precision)
    seen = run(build(name), precision, watch=watched(tmp_path / "run"))
    assert torch.equal(plain[0], seen[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], seen[1], strict=True))
    assert Profile.load(tmp_path / "run").steps == [0, 1, 2]


@pytest.mark.parametrize("name", models.ALL)
def test_every_leaf_module_that_ran_is_seen_forward_and_backward(tmp_path, name):
    model = build(name)
    run(model, watch=watched(tmp_path / "run"))
    sites = {(s.module, s.role) for s in Profile.load(tmp_path / "run").sites}
    for module_name, module in model.named_modules():
        if next(module.children(), None) is None and module_name != "frozen":
            assert (module_name, Role.OUTPUT) in sites, module_name
            assert (module_name, Role.GRAD_OUTPUT) in sites, module_name
    for parameter_name, parameter in model.named_parameters():
        owner = parameter_name.rpartition(".")[0]
        if parameter.requires_grad:
            assert {(owner, r) for r in (Role.WEIGHT, Role.GRAD_WEIGHT, Role.UPDATE)} <= sites


def merged(profile, module, role, call=0):
    sites, table = profile.merged()
    return table.row(sites.index(Site(module, role, call)))


def test_statistics_equal_those_of_the_tensors(tmp_path):
    """Every role against tensors caught by hand in an unwatched twin of the run."""
    torch.manual_seed(0)
    model = models.MLP()
    x, y = models.batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        F.cross_entropy(model(x), y).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        rec.step()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = models.MLP()
    twin.load_state_dict(before)
    hidden = twin.fc1(x)
    active = twin.act(hidden)
    out = twin.fc2(active)
    grads = torch.autograd.grad(F.cross_entropy(out, y), [hidden, active, out])
    profile = Profile.load(tmp_path / "run")
    expected = {
        ("fc1", Role.INPUT): x,
        ("fc1", Role.OUTPUT): hidden,
        ("act", Role.INPUT): hidden,
        ("act", Role.OUTPUT): active,
        ("fc2", Role.INPUT): active,
        ("", Role.OUTPUT): out,
        ("fc1", Role.GRAD_OUTPUT): grads[0],
        ("act", Role.GRAD_INPUT): grads[0],
        ("fc2", Role.GRAD_INPUT): grads[1],
        ("fc2", Role.GRAD_OUTPUT): grads[2],
    }
    for (module, role), tensor in expected.items():
        assert merged(profile, module, role) == summarize(tensor.detach()), (module, role)
    for module in ("fc1", "fc2"):
        for role, values in (
            (Role.WEIGHT, before),
            (Role.GRAD_WEIGHT, gradients),
            (Role.UPDATE, {n: after[n] - before[n] for n in before}),
            (Role.STATE, gradients),  # the first momentum buffer is the gradient
        ):
            both = summarize(values[f"{module}.weight"]) + summarize(values[f"{module}.bias"])
            assert merged(profile, module, role) == both, (module, role)


def test_call_indices_and_the_cap(tmp_path):
    for cap, calls in ((16, {0, 1, 2}), (2, {0, 1})):
        run(build("shared"), watch=watched(tmp_path / str(cap), max_calls=cap), steps=1)
        profile = Profile.load(tmp_path / str(cap))
        assert {s.call for s in profile.sites if s.module == "layer" and s.role is Role.OUTPUT} == calls
        sites, table = profile.merged(by="module")
        total = table.row(sites.index(Site("layer", Role.OUTPUT))).count
        assert total == 3 * 6 * 8


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint_reentrant"])
def test_recomputation_is_not_counted_twice(tmp_path, name):
    run(build(name), watch=watched(tmp_path / "run"), steps=1)
    profile = Profile.load(tmp_path / "run")
    roles = (Role.OUTPUT, Role.INPUT, Role.GRAD_OUTPUT, Role.GRAD_INPUT)
    for module, role in [("body.fc1", r) for r in roles] + [("body", Role.GRAD_INPUT)]:
        width = 16 if role in (Role.OUTPUT, Role.GRAD_OUTPUT) else 8
        assert merged(profile, module, role).count == 6 * width, (module, role)
    assert {s.call for s in profile.sites} == {0}


def test_checkpointed_gradients_equal_those_without(tmp_path):
    plain = models.Checkpointed(reentrant=False)
    for reentrant in (False, True):
        model = models.Checkpointed(reentrant=reentrant)
        model.load_state_dict(plain.state_dict())
        run(model, watch=watched(tmp_path / str(reentrant)), steps=1)
    a, b = (Profile.load(tmp_path / str(r)) for r in (False, True))
    for module in ("body.fc1", "body.fc2", "stem"):
        assert merged(a, module, Role.GRAD_OUTPUT) == merged(b, module, Role.GRAD_OUTPUT)


def test_accumulation_merges_micro_batches(tmp_path):
    run(build("mlp"), watch=watched(tmp_path / "run"), steps=2, accumulate=4)
    profile = Profile.load(tmp_path / "run")
    history = profile.history()
    rows = history[(history.module == "fc1") & (history.role == "output")]
    assert rows["count"].tolist() == [4 * 6 * 16] * 2
    assert {s.call for s in profile.sites if s.role is not Role.STATE} == {0}


def test_loss_scale_is_divided_out(tmp_path):
    """The gradients of a scaled run equal those of the unscaled one: fp32 times a power of two is exact."""
    for name, scale in (("plain", 1.0), ("scaled", 2.0**10), ("odd", 3000.0)):
        torch.manual_seed(0)
        model = models.MLP()
        with record(model, tmp_path / name, scaler=scale, every=1) as rec:
            (models.loss_of(model, models.batch(0)) * scale).backward()
            rec.step()
    plain, scaled, odd = (Profile.load(tmp_path / n) for n in ("plain", "scaled", "odd"))
    for site in (("fc1", Role.GRAD_OUTPUT), ("fc2", Role.GRAD_WEIGHT)):
        a, b, c = (merged(p, *site) for p in (plain, scaled, odd))
        assert np.array_equal(a.counts, b.counts) and a.amax == b.amax and a.zeros == b.zeros
        assert c.amax == pytest.approx(a.amax, rel=1e-5)
        assert abs(c.counts.sum() - a.counts.sum()) <= 1
    assert set(scaled.history().query("role == 'grad_output'").loss_scale) == {2.0**10}
    assert set(scaled.history().query("role == 'output'").loss_scale) == {1.0}


def test_gradient_scaler_scale_is_stored_with_skipped_steps(tmp_path):
    torch.manual_seed(0)
    model = models.MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with record(model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1) as rec:
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = models.loss_of(model, models.batch(step))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            rec.step()
    history = Profile.load(tmp_path / "run").history()
    grads = history[history.role == "grad_weight"]
    assert grads.groupby("step").loss_scale.first().tolist() == [2.0**40, 2.0**39, 2.0**38]
    assert (grads.pos_inf + grads.neg_inf + grads.nan).sum() > 0  # the overflow that made the scaler skip is seen
    assert not (history.role == "update").any()  # and no update happened


def test_shared_tensor_is_reduced_once(tmp_path, monkeypatch):
    from precscope.recording.observations import Observations

    reduced = []
    original = Observations.reduce
    monkeypatch.setattr(Observations, "reduce", lambda self, x: reduced.append(x.shape) or original(self, x))
    many = Observations.reduce_many
    monkeypatch.setattr(
        Observations, "reduce_many", lambda self, xs: reduced.extend(x.shape for x in xs) or many(self, xs)
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with record(model, tmp_path / "run", every=1), torch.no_grad():
        model(models.batch(0)[0])
    # 4 parameters, the input, and three outputs of which two are the next input
    assert len(reduced) == 4 + 4


def test_residual_branches_share_one_gradient(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x)
            return x + self.b(x)

    torch.manual_seed(0)
    model = Residual()
    x = models.batch(0)[0]
    with record(model, tmp_path / "run", every=1) as rec:
        model(x).pow(2).sum().backward()
        rec.step()
    h = model.a(x).detach().requires_grad_()
    b = model.b(h)
    out = h + b
    grads = torch.autograd.grad(out.pow(2).sum(), [h, b])
    profile = Profile.load(tmp_path / "run")
    assert merged(profile, "a", Role.GRAD_OUTPUT) == summarize(grads[0])
    assert merged(profile, "b", Role.GRAD_INPUT) == summarize(grads[0])  # the total through both branches
    assert merged(profile, "b", Role.GRAD_OUTPUT) == summarize(grads[1])


def test_tied_weights_have_a_row_for_each_owner(tmp_path):
    run(build("tied"), watch=watched(tmp_path / "run"), steps=1)
    profile = Profile.load(tmp_path / "run")
    for role in (Role.WEIGHT, Role.GRAD_WEIGHT, Role.UPDATE):
        assert merged(profile, "emb", role) == merged(profile, "head", role)
    assert [p["owners"] for p in profile.graph["parameters"] if p["name"] == "emb.weight"] == [["emb", "head"]]


def test_every_and_detached_between(tmp_path):
    model = build("mlp")
    with record(model, tmp_path / "run", every=3) as rec:
        for step in range(7):
            assert rec.recording == (step % 3 == 0)
            assert bool(model.fc1._forward_hooks) == rec.recording
            models.loss_of(model, models.batch(step)).backward()
            rec.step()
    assert Profile.load(tmp_path / "run").steps == [0, 3, 6]


def test_a_loop_that_raises_leaves_no_hook_and_loses_nothing(tmp_path):
    model = build("mlp")
    with pytest.raises(ZeroDivisionError), record(model, tmp_path / "run", every=1, flush_every=100) as rec:
        for step in range(5):
            models.loss_of(model, models.batch(step)).backward()
            if step == 3:
                raise ZeroDivisionError
            rec.step()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    profile = Profile.load(tmp_path / "run")
    assert profile.run["status"] == "failed" and "ZeroDivisionError" in profile.run["error"]
    assert profile.steps == [0, 1, 2, 3]


def test_a_model_that_raises_inside_forward(tmp_path):
    class Raises(models.MLP):
        fail = False

        def forward(self, x):
            y = self.fc1(x)
            if self.fail:
                raise ValueError("on purpose")
            return self.fc2(self.act(y))

    model = Raises()
    with record(model, tmp_path / "run", every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        rec.step()
        model.fail = True
        with pytest.raises(ValueError, match="on purpose"):
            model(models.batch(1)[0])
        model.fail = False
        models.loss_of(model, models.batch(1)).backward()
        rec.step()
    history = Profile.load(tmp_path / "run").history()
    assert (history.query("module == 'fc2' and role == 'output'")["count"] == 6 * 4).all()


@pytest.mark.parametrize("first", ["no_grad", "inference_mode"])
def test_inference_and_no_grad(tmp_path, first):
    model = build("mlp").eval()
    contexts = [torch.no_grad(), torch.inference_mode()]
    with record(model, tmp_path / "run", every=1) as rec:
        for context in contexts if first == "no_grad" else contexts[::-1]:
            with context:
                model(models.batch(0)[0])
            rec.step()
    roles = {s.role for s in Profile.load(tmp_path / "run").sites}
    assert roles == {Role.INPUT, Role.OUTPUT, Role.WEIGHT}


def test_meta_tensors_are_skipped(tmp_path):
    model = models.MLP().to("meta")
    with record(model, tmp_path / "run", every=1) as rec:
        model(torch.empty(3, 8, device="meta"))
        rec.step()
    assert Profile.load(tmp_path / "run").sites == []


def test_compiled_model_runs_recorded_steps_eagerly(tmp_path):
    model = build("mlp")
    compiled = torch.compile(model, backend="eager")
    x = models.batch(0)[0]
    compiled(x)
    with record(compiled, tmp_path / "run", every=2) as rec:
        for _ in range(4):
            compiled(x).sum().backward()
            rec.step()
    profile = Profile.load(tmp_path / "run")
    assert profile.steps == [0, 2]
    assert merged(profile, "fc1", Role.OUTPUT).count == 2 * 6 * 16


def test_several_optimizers_and_lbfgs(tmp_path):
    model = build("mlp")
    parts = [torch.optim.SGD(model.fc1.parameters(), lr=0.1), torch.optim.Adam(model.fc2.parameters(), lr=0.1)]
    with record(model, tmp_path / "two", optimizer=parts, every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        for optimizer in parts:
            optimizer.step()
        rec.step()
    assert {s.module for s in Profile.load(tmp_path / "two").sites if s.role is Role.UPDATE} == {"fc1", "fc2"}
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        lbfgs.zero_grad()
        loss = models.loss_of(model, models.batch(0))
        loss.backward()
        return loss

    with record(model, tmp_path / "lbfgs", optimizer=lbfgs, every=1) as rec:
        lbfgs.step(closure)
        rec.step()
    assert {s.module for s in Profile.load(tmp_path / "lbfgs").sites if s.role is Role.UPDATE} == {"fc1", "fc2"}


def test_two_models_as_in_a_gan(tmp_path):
    a, b = build("mlp"), models.MLP(4, 1)
    with record(a, tmp_path / "a", every=1) as ra, record(b, tmp_path / "b", every=1) as rb:
        b(a(models.batch(0)[0])).sum().backward()
        ra.step()
        rb.step()
    fake = merged(Profile.load(tmp_path / "a"), "", Role.OUTPUT)
    assert fake == merged(Profile.load(tmp_path / "b"), "", Role.INPUT)


def test_swallowed_updates_are_told_from_the_ratio(tmp_path):
    from precscope.histogram import swallowed_share

    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        model(torch.randn(16, 64)).pow(2).mean().backward()
        optimizer.step()
        rec.step()
    profile = Profile.load(tmp_path / "run")
    index = profile.sites.index(Site("", Role.UPDATE, 0, "weight"))
    counts, unchanged, from_zero = profile.ratios[index]
    assert counts.sum() + unchanged + from_zero == 64 * 64
    lo, hi = swallowed_share(counts, 7, unchanged=unchanged, from_zero=from_zero)
    assert 0.5 < lo <= hi <= 1.0  # lr 1e-3 on gradients far below the weights: bf16 would not move


def test_a_full_disk_warns_and_the_run_goes_on(tmp_path, monkeypatch):
    from precscope.store import files as store

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = build("mlp")
    with pytest.warns(RuntimeWarning, match="stopped recording: .*No space left"):
        with record(model, tmp_path / "run", every=1, flush_every=1) as rec:
            for step in range(5):
                models.loss_of(model, models.batch(step)).backward()
                if step == 2:
                    monkeypatch.setattr(store.os, "replace", full)
                rec.step()
            monkeypatch.undo()
    assert rec.failed and not model.fc1._forward_hooks
    assert Profile.load(tmp_path / "run").steps == [0, 1]
    assert not list((tmp_path / "run").glob("*.tmp*"))


def test_a_full_disk_raises_where_asked(tmp_path, monkeypatch):
    from precscope.store import files as store

    model = build("mlp")
    with pytest.raises(RunDirectoryError, match="free space or choose another directory"):
        with record(model, tmp_path / "run", every=1, flush_every=1, on_error="raise") as rec:
            models.loss_of(model, models.batch(0)).backward()
            monkeypatch.setattr(store.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
            rec.step()
    monkeypatch.undo()
    assert not model.fc1._forward_hooks


def test_wrong_arguments(tmp_path):
    model = build("mlp")
    with pytest.raises(UsageError, match="every.*1 or more"):
        record(model, tmp_path, every=0)
    with pytest.raises(UsageError, match="on_error must be 'warn' or 'raise'"):
        record(model, tmp_path, on_error="ignore")
    with pytest.raises(UsageError, match="torch.optim.Optimizer"):
        record(model, tmp_path, optimizer="adam")
    with pytest.raises(ModelError, match="expected a torch.nn.Module, got str"):
        record("model", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="choose another directory"), record(model, tmp_path / "file"):
        pass
    with record(model, tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match="already holds a run"), record(model, tmp_path / "run"):
        pass


def test_run_and_graph_files(tmp_path):
    model = build("conv")
    run(model, watch=watched(tmp_path / "run", info={"task": "mine"}))
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["status"] == "done" and content["task"] == "mine" and content["schema"] == 1
    graph = json.loads((tmp_path / "run" / "graph.json").read_text())
    edges = {(e["producer"], e["consumer"]) for e in graph["edges"]}
    assert ("conv", "bn") in edges and ("", "head") in edges
    by_name = {m["name"]: m for m in graph["modules"]}
    assert by_name["conv"]["type"] == "Padded" and by_name["conv"]["calls"] == 1 and by_name["conv"]["leaf"]


def test_model_without_parameters(tmp_path):
    class Doubles(nn.Module):
        def forward(self, x):
            return 2 * x

    with record(Doubles(), tmp_path / "run", every=1) as rec:
        rec.model(torch.ones(3))
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "", Role.OUTPUT).amax == 2.0


def test_a_batch_of_nan_is_counted(tmp_path):
    model = build("mlp")
    with warnings.catch_warnings(), record(model, tmp_path / "run", every=1) as rec:
        model(torch.full((3, 8), float("nan"))).sum().backward()
        rec.step()
    table = Profile.load(tmp_path / "run").ask("fp16")
    row = table[(table.module == "fc1") & (table.role == "input")].iloc[0]
    assert row.nonfinite == 1.0 and row.overflow_hi == 0.0


def test_paused_parts_are_not_recorded(tmp_path):
    model = build("mlp")
    with record(model, tmp_path / "run", every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        with rec.paused(), torch.no_grad():
            model(models.batch(1, 100)[0])
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "fc1", Role.OUTPUT).count == 6 * 16


def test_updates_of_a_step_that_the_device_skipped_are_left_out(tmp_path):
    """A fused optimizer is told found_inf and decides on the device; its step hooks fire all the same."""
    torch.manual_seed(0)
    model = models.MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with record(model, tmp_path / "run", optimizer=optimizer, scaler=scaler, every=1) as rec:
        for step in range(2):
            loss = models.loss_of(model, models.batch(step))
            scaler.scale(loss * (2.0**100 if step == 0 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            optimizer.zero_grad()
            rec.step()
    history = Profile.load(tmp_path / "run").history()
    assert set(history[history.role == "update"].step) == {1}


def test_a_sequential_root_begins_a_pass(tmp_path):
    """Micro-batches of a plain nn.Sequential merge; they are no further calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    run(model, watch=watched(tmp_path / "run"), steps=2, accumulate=3)
    profile = Profile.load(tmp_path / "run")
    assert {s.call for s in profile.sites} == {0}
    assert {m["name"]: m["calls"] for m in profile.graph["modules"]} == {"": 1, "0": 1, "1": 1, "2": 1}


def test_deepcopy_in_a_recorded_step(tmp_path):
    import copy

    model = build("mlp")
    with record(model, tmp_path / "run", every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        ema = copy.deepcopy(model)
        ema(models.batch(1)[0])  # a copy is not the model: not recorded
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "fc1", Role.OUTPUT).count == 6 * 16
    ema(models.batch(1)[0])
    for hooks in (m._forward_hooks for m in ema.modules()):
        hooks.clear()
    for hooks in (m._forward_pre_hooks for m in ema.modules()):
        hooks.clear()


def test_compile_stance_is_put_back_with_two_recorders(tmp_path):
    import torch._dynamo.eval_frame as eval_frame

    a, b = build("mlp"), build("mlp")
    for m in (a, b):
        torch.compile(m, backend="eager")
    stance = torch.compiler.set_stance("eager_on_recompile")
    try:
        with record(a, tmp_path / "a", every=2) as ra, record(b, tmp_path / "b", every=3) as rb:
            for step in range(4):
                expected = "force_eager" if step % 2 == 0 or step % 3 == 0 else "eager_on_recompile"
                assert eval_frame._stance.stance == expected, step
                ra.step()
                rb.step()
        assert eval_frame._stance.stance == "eager_on_recompile"
    finally:
        stance.__exit__(None, None, None)


def test_step_outside_the_block(tmp_path):
    model = build("mlp")
    rec = record(model, tmp_path / "run", every=1)
    with pytest.raises(UsageError, match="belongs inside the with block"):
        rec.step()
    with rec:
        pass
    with pytest.raises(UsageError, match="belongs inside the with block"):
        rec.step()
    assert not model.fc1._forward_hooks


def test_several_optimizer_steps_in_one_recorded_step(tmp_path):
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        for step in range(3):
            models.loss_of(model, models.batch(step)).backward()
            optimizer.step()
        rec.step()
    profile = Profile.load(tmp_path / "run")
    assert merged(profile, "", Role.UPDATE).count == 3 * 32
    counts, unchanged, from_zero = profile.ratios[profile.sites.index(Site("", Role.UPDATE, 0, "weight"))]
    assert counts.sum() + unchanged + from_zero == 3 * 32


def test_flush_inside_a_step_counts_nothing_twice(tmp_path):
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        rec.flush()
        optimizer.step()
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "fc1", Role.GRAD_WEIGHT).count == 8 * 16 + 16


def test_an_optimizer_step_that_raised_leaves_no_stale_copy(tmp_path):
    model = nn.Linear(8, 4, bias=False)

    class Fails(torch.optim.SGD):
        fail = True

        def step(self, closure=None):
            if self.fail:
                raise ArithmeticError
            return super().step(closure)

    optimizer = Fails(model.parameters(), lr=1e-3)
    with record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        with pytest.raises(ArithmeticError):
            optimizer.step()
        rec.step()
        with torch.no_grad():
            model.weight.add_(5.0)
        optimizer.fail = False
        models.loss_of(model, models.batch(0)).backward()
        optimizer.step()
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "", Role.UPDATE).amax < 0.1


def test_torch_func_and_unusual_tensors_pass_unseen(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("scales", torch.ones(4).to(torch.float8_e8m0fnu))

        def forward(self, x):
            return self.fc(x)

    model = Odd()
    with record(model, tmp_path / "run", every=1) as rec:
        per_sample = torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(torch.ones(3, 4))
        assert per_sample.shape == (3, 4)
        model(torch.ones(2, 4)).sum().backward()
        rec.step()
    assert merged(Profile.load(tmp_path / "run"), "fc", Role.OUTPUT).count == 8


def test_a_recursive_root(tmp_path):
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            return self(self.fc(x), depth - 1) if depth else x

    with record(Recursive(), tmp_path / "run", every=1) as rec:
        rec.model(torch.ones(2, 4)).sum().backward()
        rec.step()
    assert {s.call for s in Profile.load(tmp_path / "run").sites if s.module == "fc"} == {0, 1}


def test_edges_go_to_the_innermost_taker_and_flops_are_estimated(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Linear(8, 8), models.MLP(8, 4)

        def forward(self, x):
            return self.block(self.stem(x))

    model = Outer()
    with record(model, tmp_path / "run", every=1) as rec:
        model(models.batch(0)[0])
        rec.step()
    graph = Profile.load(tmp_path / "run").graph
    edges = {(e["producer"], e["consumer"]) for e in graph["edges"]}
    assert ("stem", "block.fc1") in edges and ("stem", "block") not in edges
    assert {m["name"]: m["flops"] for m in graph["modules"]}["stem"] == 2 * 6 * 8 * 8


def test_a_resumed_recording_replaces_the_steps_it_repeats(tmp_path):
    model = build("mlp")
    for first, last in ((0, 6), (3, 8)):
        with record(model, tmp_path / "run", every=1, flush_every=2, exist="append", first_step=first) as rec:
            for step in range(first, last):
                models.loss_of(model, models.batch(step)).backward()
                rec.step()
    history = Profile.load(tmp_path / "run").history().query("module == 'fc1' and role == 'output'")
    assert history.step.tolist() == list(range(8))


def test_a_late_rank_does_not_take_the_run_for_an_old_one(tmp_path, monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        model = build("mlp")
        with record(model, tmp_path / "run", every=1, merge=False) as rec:
            models.loss_of(model, models.batch(rank)).backward()
            rec.step()
    assert merged(Profile.load(tmp_path / "run"), "fc1", Role.OUTPUT).count == 2 * 6 * 16


def test_going_back_drops_what_did_not_count(tmp_path):
    model = models.MLP()
    with record(model, tmp_path, every=2, flush_every=2) as rec:
        for _ in range(7):
            model(torch.ones(2, 8)).sum().backward()
            rec.step()
        rec.go_back(3)
        assert rec.index == 3 and not rec.recording
        with pytest.raises(UsageError, match=r"go_back\(\) .* goes to an earlier step: this is step 3, not 4"):
            rec.go_back(4)
        for _ in range(3):
            model(torch.ones(2, 8)).sum().backward()
            rec.step()
    found = Profile.load(tmp_path)
    assert found.steps == [0, 2, 4] and found.run["recorded_steps"] == 3
    with pytest.raises(UsageError, match="belongs inside the with block"):
        rec.go_back(0)
