"""Shadow steps: they see true fp32, tell the truth about the running gradients, and leave nothing behind."""

from __future__ import annotations

import copy
import math
import warnings

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.applying import apply
from precscope.applying.suspension import suspended
from precscope.emulation import emulate
from precscope.errors import RunDirectoryError, UsageError
from precscope.histogram import BINS, EXP_LO
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.profiles import Profile
from precscope.recording import record
from precscope.sites import Role, Site
from precscope.store import CHANGES, read_part


class Noisy(nn.Module):
    """Dropout and batch norm: random numbers and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.drop, self.fc2 = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.drop(F.relu(self.bn(self.fc1(x)))))


def noisy_loss(model, batch):
    """Draws before it calls the model, too."""
    x, y = batch
    return F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)


ALL = {**models.ALL, "noisy": Noisy}


def build(name):
    torch.manual_seed(0)
    return ALL[name]()


def loop(model, precision="fp32", *, out=None, steps=3, shadow=False, unscale=False, loss_of=noisy_loss, every=1):
    """A user's own loop; returns losses, weights, buffers, the generator's state and the Truth of each step."""
    torch.manual_seed(1)
    sparse = any(isinstance(m, nn.Embedding) and m.sparse for m in model.modules())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD if sparse else torch.optim.AdamW)(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**12)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    losses, truths = [], []
    with record(model, out, optimizer=optimizer, scaler=scaler, every=every) as rec:
        for step in range(steps):
            batch = models.batch(step)
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if shadow:
                truths.append(rec.shadow(lambda batch=batch: loss_of(model, batch), loss=loss))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach().clone())
            rec.step()
    state = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return torch.stack(losses), state, torch.get_rng_state(), truths


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ALL)
def test_the_run_does_not_notice(tmp_path, name, precision):
    if precision == "fp16" and name in ("sparse", "lstm"):
        pytest.skip("torch has no fp16 LSTM on the CPU, and no unscaling of sparse CPU gradients")
    plain = loop(build(name), precision, out=tmp_path / "plain")
    shadowed = loop(build(name), precision, out=tmp_path / "shadowed", shadow=True)
    assert torch.equal(plain[0], shadowed[0]) and torch.equal(plain[2], shadowed[2])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], shadowed[1], strict=True))
    a, b = Profile.load(tmp_path / "plain"), Profile.load(tmp_path / "shadowed")
    assert a.sites == b.sites and np.array_equal(a.table.counts, b.table.counts)  # nothing is counted twice
    assert np.array_equal(a.table.sumsq, b.table.sumsq)
    assert a.shadow is None and a.truth is None
    assert b.shadow.steps == [0, 1, 2] and sorted(b.truth.step.unique()) == [0, 1, 2]


@pytest.mark.parametrize("name", ALL)
def test_in_fp32_the_truth_is_the_run_itself(tmp_path, name):
    """Bit for bit: dropout, noise drawn by the loss, batch statistics, checkpoints."""
    *_, truths = loop(build(name), out=tmp_path / "run", shadow=True)
    for truth in truths:
        assert truth.loss_low == truth.loss_fp32
        assert set(truth.rel_error) == {0.0}
        trained = [n for n, p in build(name).named_parameters() if p.requires_grad]
        assert sorted(truth.parameters) == sorted(trained)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_truth_about_low_precision(tmp_path, precision, unscale):
    """Against gradients taken by hand; the loss scale is divided out wherever the scaler stands."""
    model = build("mlp")
    x, y = models.batch(0)
    twin = copy.deepcopy(model)
    exact = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
    with torch.autocast("cpu", dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        loss = F.cross_entropy(twin(x), y)
    low = [g / 2**12 for g in torch.autograd.grad(loss * 2.0**12, list(twin.parameters()))]
    *_, truths = loop(
        model, precision, out=tmp_path / "run", steps=1, shadow=True, unscale=unscale, loss_of=models.loss_of
    )
    table = Profile.load(tmp_path / "run").truth.set_index("parameter")
    assert list(table.columns) == [c for c in ps.store.TRUTH_COLUMNS if c != "parameter"]
    for (name, _), g32, g in zip(twin.named_parameters(), exact, low, strict=True):
        tolerance = 1e-3 if precision == "fp16" else 1e-6  # 2^12 in fp16 rounds subnormals otherwise
        assert table.rel_error[name] == pytest.approx(float((g - g32).norm() / g32.norm()), rel=tolerance)
        assert table.cosine[name] == pytest.approx(float(F.cosine_similarity(g.flatten(), g32.flatten(), 0)), rel=1e-6)
        assert table.grad_norm_fp32[name] == pytest.approx(float(g32.norm()), rel=1e-6)
        assert 0 < table.rel_error[name] < 0.02 and table.module[name] == name.partition(".")[0]
    assert truths[0].loss_fp32 == pytest.approx(F.cross_entropy(twin(x), y).item(), rel=1e-6) != truths[0].loss_low


def weights_by_hand(y: torch.Tensor, g: torch.Tensor) -> np.ndarray:
    values, gradient = y.detach().double().numpy().ravel(), g.double().numpy().ravel()
    kept = values != 0
    column = np.frexp(values[kept])[1] - 1 - EXP_LO
    return np.bincount(column, weights=gradient[kept] ** 2, minlength=BINS)


def test_weights_are_the_squared_gradients_of_each_binade(tmp_path):
    model = build("mlp")
    x, y = models.batch(0)
    twin = copy.deepcopy(model)
    hidden = twin.fc1(x)
    active = twin.act(hidden)
    tensors = {("fc1", "output"): hidden, ("act", "input"): hidden, ("act", "output"): active, ("fc2", "input"): active,
               ("fc1", "weight"): twin.fc1.weight}  # fmt: skip
    grads = torch.autograd.grad(F.cross_entropy(twin.fc2(active), y), list(tensors.values()))
    loop(model, "bf16", out=tmp_path / "run", steps=1, shadow=True, loss_of=models.loss_of)
    shadow = Profile.load(tmp_path / "run").shadow
    for (module, role), g in zip(tensors, grads, strict=True):
        index = shadow.sites.index(Site(module, Role(role), 0, "weight" if role == "weight" else ""))
        np.testing.assert_allclose(
            shadow.table.weights[index], weights_by_hand(tensors[module, role], g), rtol=1e-5, atol=1e-30
        )
    unpriced = shadow.sites.index(Site("fc1", Role.INPUT))
    assert np.isnan(shadow.table.weights[unpriced]).all()  # the batch has no gradient
    source = {s for s, site in zip(shadow.table.source, shadow.sites, strict=True) if site.role is Role.OUTPUT}
    assert source == {"fp32"}


def _weights_of_part(path, module="fc1", role="output") -> np.ndarray:
    rows = read_part(path, kind="shadow").to_pandas()
    row = rows[(rows.module == module) & (rows.role == role)].iloc[0]
    out = np.zeros(BINS)
    out[int(row.weights_lo) - EXP_LO :][: len(row.weights)] = row.weights
    return out


def test_loss_noise_is_that_of_one_step_and_follows_the_formula(tmp_path):
    loop(build("mlp"), "bf16", out=tmp_path / "one", steps=1, shadow=True, loss_of=models.loss_of)
    loop(build("mlp"), "bf16", out=tmp_path / "four", steps=4, shadow=True, loss_of=models.loss_of)
    one, four = Profile.load(tmp_path / "one"), Profile.load(tmp_path / "four")
    table = one.ask("bf16", by="tensor").set_index(["module", "role"])
    index = one.shadow.sites.index(Site("fc1", Role.OUTPUT))
    binades = np.arange(EXP_LO, EXP_LO + BINS)
    expected = math.sqrt((one.shadow.table.weights[index] * 4.0 ** (binades - 7) / 12).sum())
    assert table.loss_noise["fc1", "output"] == pytest.approx(expected, rel=1e-3)
    steps = [_weights_of_part(part) for part in sorted((tmp_path / "four").glob("shadow-*.parquet"))]
    index = four.shadow.sites.index(Site("fc1", Role.OUTPUT))
    np.testing.assert_allclose(four.shadow.table.weights[index], np.mean(steps, axis=0), rtol=1e-12)
    by_module = one.ask("bf16", by="module").set_index(["module", "role"]).loss_noise
    assert by_module["fc1", "output"] == table.loss_noise["fc1", "output"]
    parts = one.ask("bf16", by="tensor", roles=["weight"])
    both = one.ask("bf16", roles=["weight"])
    assert (parts.loss_noise**2).sum() == pytest.approx((both.loss_noise**2).sum())


def test_parameters_are_really_rounded(tmp_path):
    """Weights that lie around 1 round all the same way: their errors add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.uniform_(0.97, 0.99)
    x, y = models.batch(0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    weight, gradient = model[0].weight.detach(), model[0].weight.grad
    with record(model, tmp_path / "run", every=1) as rec:
        F.cross_entropy(model(x), y)
        rec.shadow(lambda: F.cross_entropy(model(x), y))
    shadow = Profile.load(tmp_path / "run").shadow
    index = shadow.sites.index(Site("0", Role.WEIGHT, 0, "weight"))
    for fmt in CHANGES:
        change = float(((ps.quantize(weight, fmt) - weight).double() * gradient).sum())
        assert shadow.rounded[fmt][index] == pytest.approx(change**2, rel=1e-4)
    assert np.isnan(shadow.rounded["e4m3"][shadow.sites.index(Site("0", Role.OUTPUT))])
    row = shadow.ask("e4m3", by="tensor", roles=["weight"]).loss_noise[0]
    independent = shadow.table.take([index]).ask("e4m3")["loss_noise"][0]
    assert row == pytest.approx(math.sqrt((shadow.rounded["e4m3"][index] + independent**2) / 2))


@pytest.mark.parametrize("name", ["in_place", "checkpoint", "checkpoint_reentrant", "shared", "tied", "conv", "sparse"])
def test_prices_agree_with_rounding_for_awkward_models(tmp_path, name):
    """Every output: the predicted first-order noise against g (Q(y) - y), both taken from the same tensors."""
    model = build(name)
    loop(model, "fp32", out=tmp_path / "run", steps=1, shadow=True, loss_of=models.loss_of)
    shadow = Profile.load(tmp_path / "run").shadow
    priced = {s for s, w in zip(shadow.sites, shadow.table.weights, strict=True) if not np.isnan(w).any()}
    for module_name, module in build(name).named_modules():
        if next(module.children(), None) is None and module_name != "frozen":
            assert any(s.module == module_name and s.role is Role.OUTPUT for s in priced), module_name
    if name == "shared":
        assert {s.call for s in priced if s.module == "layer" and s.role is Role.OUTPUT} == {0, 1, 2}


def test_a_tensor_that_is_written_over_is_priced_by_what_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    plain.load_state_dict(model.state_dict())
    tables = []
    for m in (model, plain):
        loop(m, out=tmp_path / str(len(tables)), steps=1, shadow=True, loss_of=models.loss_of)
        shadow = Profile.load(tmp_path / str(len(tables))).shadow
        tables.append(shadow.table.take([shadow.sites.index(Site(n, Role.OUTPUT)) for n in ("0", "1")]))
    assert np.array_equal(tables[0].weights, tables[1].weights) and tables[0].weights[0].sum() > 0


def test_a_view_of_a_tensor_and_a_tensor_at_two_sites_are_priced_once(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.id, self.b = nn.Linear(8, 8), nn.Identity(), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.id(self.a(x)).view(-1, 2, 4)).mean(1)

    torch.manual_seed(0)
    loop(Views(), out=tmp_path / "run", steps=1, shadow=True, loss_of=models.loss_of)
    shadow = Profile.load(tmp_path / "run").shadow
    rows = [shadow.sites.index(s) for s in (Site("a", Role.OUTPUT), Site("id", Role.INPUT), Site("id", Role.OUTPUT))]
    view = shadow.sites.index(Site("b", Role.INPUT))
    assert all(np.array_equal(shadow.table.weights[i], shadow.table.weights[view]) for i in rows)
    torch.manual_seed(0)
    model = Views()
    y = model.a(models.batch(0)[0])
    g = torch.autograd.grad(F.cross_entropy(model.b(y.view(-1, 2, 4)).mean(1), models.batch(0)[1]), y)[0]
    assert shadow.table.weights[view].sum() == pytest.approx(float(g.double().square().sum()), rel=1e-5)


def test_autocast_inside_the_closure_has_no_effect(tmp_path):
    model, batch = build("mlp"), models.batch(0)
    kept = torch.autocast("cpu", dtype=torch.bfloat16)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def decorated():
        return models.loss_of(model, batch)

    def reused():
        with kept:
            return models.loss_of(model, batch)

    exact = float(models.loss_of(model, batch).detach())
    with record(model, tmp_path / "run", every=1) as rec:
        for closure in (decorated, reused):
            with torch.autocast("cpu", dtype=torch.bfloat16):  # around the call as well
                assert rec.shadow(closure).loss_fp32 == exact
                assert torch.is_autocast_enabled("cpu")
            rec.step()
    assert float(reused().detach()) != exact  # and it works again


def test_switches_of_the_backends_are_put_back():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), suspended(nn.Linear(2, 2)):
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before


PLANS = {
    "autocast": PrecisionPlan(default=LayerPrecision("bf16")),
    "cast": PrecisionPlan(default=LayerPrecision("bf16", policy="cast", params="bf16")),
    "islands": PrecisionPlan(default=LayerPrecision("bf16"), modules={"fc2": LayerPrecision("fp32")}),
    "e4m3": PrecisionPlan(default=LayerPrecision("e4m3", policy="cast")),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_suspended_and_comes_back(plan):
    model, batch = build("mlp"), models.batch(0)
    with apply(PLANS[plan], model):
        low = models.loss_of(model, batch)
        twin = build("mlp")
        twin.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        forwards = [m.__dict__.get("forward") for m in model.modules()]
        dtypes = [p.dtype for p in model.parameters()]
        with suspended(model) as stand_ins:
            exact = models.loss_of(model, batch)
            exact.backward()
            assert exact.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
            assert all(new.grad is not None for new in stand_ins)
        assert torch.equal(exact, models.loss_of(twin, batch)) and not torch.equal(low, exact)
        assert [m.__dict__.get("forward") for m in model.modules()] == forwards
        assert [p.dtype for p in model.parameters()] == dtypes
        assert torch.equal(low, models.loss_of(model, batch))


def test_a_model_stored_low_is_seen_in_fp32(tmp_path):
    """model.half() and its low inputs; fp64 stays; an LSTM's second list of weights follows."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    x, y = models.batch(0)

    def loss():
        return F.cross_entropy(model(x.bfloat16()).float(), y)

    with record(model, tmp_path / "run", every=1) as rec:
        low = loss()
        low.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        truth = rec.shadow(loss, loss=low)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert truth.parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert all(0 < e < 0.05 for e in truth.rel_error)
    profile = Profile.load(tmp_path / "run")
    table = profile.ask("bf16", by="tensor").set_index(["module", "role", "tensor"])
    assert table.loss_noise["0", "weight", "weight"] == 0  # stored in bf16 it is exact
    assert table.loss_noise["0", "output", ""] > 0  # computed in bf16 it was not
    recurrent = models.Recurrent().to(torch.bfloat16)
    with suspended(recurrent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert recurrent(x).dtype == torch.float32
    double = nn.Linear(2, 2).double()
    with suspended(double):
        assert double(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_accumulated_micro_batches_are_compared_with_all_of_theirs(tmp_path):
    model = build("noisy")
    with record(model, tmp_path / "run", every=1) as rec:
        micro = [models.batch(i) for i in range(3)]
        for batch in micro:
            (noisy_loss(model, batch) / 3).backward()
        truth = rec.shadow([lambda b=b: noisy_loss(model, b) / 3 for b in micro])
        assert set(truth.rel_error) == {0.0} and math.isnan(truth.loss_low)
        with pytest.warns(
            RuntimeWarning, match=r"ran the model 1 times, the step itself 3 times.*one closure per micro"
        ):
            one = rec.shadow(lambda: noisy_loss(model, micro[0]) / 3)
        assert all(math.isnan(c) for c in one.cosine) and all(n > 0 for n in one.grad_norm_fp32)


def test_hooks_that_step_inside_backward_are_silent(tmp_path):
    model = build("mlp")
    calls = []
    handle = model.fc1.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    with record(model, tmp_path / "run", every=1) as rec:
        models.loss_of(model, models.batch(0)).backward()
        rec.shadow(lambda: models.loss_of(model, models.batch(0)))
        assert len(calls) == 1
        models.loss_of(model, models.batch(0)).backward()
    assert len(calls) == 2
    handle.remove()


def test_mistakes_say_what_to_do(tmp_path):
    model, batch = build("mlp"), models.batch(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="shadow_every must be 1 or more"):
        record(model, tmp_path / "x", shadow_every=0)
    with record(model, tmp_path / "run", optimizer=optimizer, every=2) as rec:
        with pytest.raises(UsageError, match="must return the loss, a scalar with a gradient, not a tensor of shape"):
            rec.shadow(lambda: model(batch[0]))
        with pytest.raises(ZeroDivisionError):
            rec.shadow(lambda: 1 / 0)
        models.loss_of(model, batch).backward()
        optimizer.step()
        with pytest.raises(UsageError, match=r"after backward\(\) and before optimizer.step\(\)"):
            rec.shadow(lambda: models.loss_of(model, batch))
        rec.step()
        assert not rec.recording and rec.shadow(lambda: models.loss_of(model, batch)) is None
    with pytest.raises(UsageError, match="inside the with block"):
        rec.shadow(lambda: models.loss_of(model, batch))
    assert torch.isfinite(models.loss_of(model, batch))


def test_due_steps_and_resumed_runs(tmp_path):
    loop(build("mlp"), out=tmp_path / "run", steps=5, shadow=True)
    model = build("mlp")
    with record(model, tmp_path / "run", every=1, exist="append", first_step=3, shadow_every=[4]) as rec:
        for step in range(3, 6):
            assert rec.shadow_due == (step == 4)
            rec.shadow(lambda: models.loss_of(model, models.batch(0)))
            rec.step()
    profile = Profile.load(tmp_path / "run")
    assert profile.shadow.steps == [0, 1, 2, 4] and sorted(profile.truth.step.unique()) == [0, 1, 2, 4]
    with record(build("mlp"), tmp_path / "run", every=1, exist="overwrite"):
        pass
    assert Profile.load(tmp_path / "run").shadow is None


@pytest.mark.parametrize("kind", ["shadow", "truth"])
def test_damaged_parts_are_named(tmp_path, kind):
    loop(build("mlp"), out=tmp_path / "run", steps=2, shadow=True)
    part = sorted((tmp_path / "run").glob(f"{kind}-*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunDirectoryError, match=f"{kind}-000001.parquet cannot be read"):
        Profile.load(tmp_path / "run")
    rest = Profile.load(tmp_path / "run", skip_damaged=True)
    assert rest.damaged == [str(part)]
    assert (rest.shadow.steps if kind == "shadow" else rest.truth.step.unique().tolist()) == [1]
    with pytest.raises(RunDirectoryError, match="was not written by precscope"):
        read_part(sorted((tmp_path / "run").glob("stats-*.parquet"))[0], kind=kind)


# the trainer


def noisy_task():
    torch.manual_seed(0)
    return ps.Task(model=Noisy(), loss=noisy_loss, batches=models.batch)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_profile_takes_shadow_steps_and_trains_the_same(tmp_path, precision, accumulate):
    options = {"steps": 9, "every": 2, "precision": precision, "accumulate": accumulate, "costs": False}
    plain, shadowed = noisy_task(), noisy_task()
    a = ps.profile(plain, out=tmp_path / "a", shadow_every=None, **options)
    b = ps.profile(shadowed, out=tmp_path / "b", **options)
    assert a.train.loss.equals(b.train.loss) and np.array_equal(a.table.counts, b.table.counts)
    for p, q in zip(plain.model.state_dict().values(), shadowed.model.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert a.shadow is None and b.shadow.steps == [0, 4, 8]
    assert np.allclose(b.truth.loss_low.unique(), b.train.loss[[0, 4, 8]], rtol=1e-7)
    errors = b.truth.rel_error[b.truth.grad_norm_fp32 > 1e-6]  # a bias before a batch norm has none
    assert (errors == 0).all() if precision == "fp32" else ((errors > 0) & (errors < 0.1)).all()


def test_training_alone_records_its_shadow_steps(tmp_path):
    plain = ps.train(noisy_task(), steps=6, precision="bf16", out=tmp_path / "a")

    def batches(step):
        if step == 5:
            raise OSError("stopped")
        return models.batch(step)

    task = noisy_task()
    task.batches = batches
    options = {"steps": 6, "precision": "bf16", "out": tmp_path / "b", "shadow_every": 2, "checkpoint_every": 3}
    with pytest.raises(OSError, match="stopped"):
        ps.train(task, **options)
    assert Profile.load(tmp_path / "b").shadow.steps == [0, 2, 4]
    told = ps.train(noisy_task(), resume=True, **options)
    assert plain.losses == told.losses
    assert Profile.load(tmp_path / "b").shadow.steps == [0, 2, 4]  # step 4 once, not twice
    assert len(Profile.load(tmp_path / "b").truth) == 3 * 6
    with pytest.raises(UsageError, match="shadow_every needs out="):
        ps.train(noisy_task(), steps=1, shadow_every=2)
    with pytest.raises(UsageError, match="integer of at least 1"):
        ps.train(noisy_task(), steps=1, shadow_every=0, out=tmp_path / "c")
    with pytest.raises(UsageError, match="number of steps of at least 1, 'auto' or None"):
        ps.profile(noisy_task(), steps=1, shadow_every="often", out=tmp_path / "c")


def test_a_plan_is_judged_against_fp32(tmp_path):
    plan = PrecisionPlan(default=LayerPrecision("bf16", policy="cast", params="bf16"))
    ps.train(noisy_task(), steps=2, plan=plan, out=tmp_path / "run", shadow_every=1)
    truth = Profile.load(tmp_path / "run").truth
    errors = truth.rel_error[truth.grad_norm_fp32 > 1e-6]
    assert len(truth) == 2 * 6 and ((errors > 1e-4) & (errors < 0.2)).all()


def test_training_goes_on_where_fp32_fails(tmp_path):
    def loss(model, batch):
        if not torch.is_autocast_enabled("cpu"):
            raise MemoryError("no room for fp32")
        return noisy_loss(model, batch)

    torch.manual_seed(0)
    task = ps.Task(model=Noisy(), loss=loss, batches=models.batch)
    with pytest.warns(RuntimeWarning, match="no shadow steps: running a step in fp32 raised MemoryError: no room"):
        result = ps.train(task, steps=4, precision="bf16", out=tmp_path / "run", shadow_every=1)
    assert result.steps == 4 and Profile.load(tmp_path / "run").shadow is None


def test_inference_is_priced_by_the_loss(tmp_path):
    task = noisy_task()
    task.forward = lambda model, batch: model(batch[0])
    profile = ps.profile(task, out=tmp_path / "run", steps=3, every=1, train=False, costs=False)
    table = profile.ask("fp16", roles=["output"])
    assert (table.loss_noise > 0).all() and profile.shadow.steps == [0, 1, 2]
    assert profile.truth.cosine.isna().all()


def test_a_shadow_step_does_not_end_a_pause_and_is_refused_inside_emulation(tmp_path):
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    with record(model, tmp_path / "run", every=1) as rec:
        model(x).sum().backward()
        with rec.paused():
            rec.shadow(lambda: model(x).sum())
            model(100 * x)
        with emulate(model, "bf16"), pytest.raises(UsageError, match=r"ps\.emulate is active: leave its with block"):
            rec.shadow(lambda: model(x).sum())
        rec.step()
    history = Profile.load(tmp_path / "run").history()
    assert history[(history.role == "input") & (history.step == 0)]["count"].tolist() == [x.numel()]


def test_a_recorder_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))

    def fails(*args, **kwargs):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model[1], "register_forward_pre_hook", fails)
    with pytest.raises(RuntimeError, match="no hooks here"):
        record(model, tmp_path / "run").__enter__()
    assert not model._forward_pre_hooks and not model[0]._forward_hooks and not model[0].weight._backward_hooks
