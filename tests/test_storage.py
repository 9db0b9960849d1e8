"""What 16-bit storage swallows: against really storing parameters, buffers and state in 16 bits and stepping."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import precscope as ps
from precscope.advice.evidence import Evidence, _ahead
from precscope.advice.storage import optimizer_advice, storage_reasons, stored_modules
from precscope.formats import get_format
from precscope.histogram import swallowed_share
from precscope.profiles import Profile
from precscope.sites import Role, Site

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"swallowed": 0.1, "flushed_state": 0.01}


def train(out, model, optimizer, loss, *, steps, every=5, after=None, passes=1):
    """Record `steps` steps of full-batch training in fp32."""
    with ps.record(model, out, optimizer=optimizer, every=every) as rec:
        for _ in range(steps):
            model.zero_grad()
            for _ in range(passes):
                (loss() / passes).backward()
            if optimizer is not None:
                optimizer.step()
            if after is not None:
                after()
            rec.step()
    return Profile.load(out)


def codes(profile, fmt):
    """unit -> codes of its reasons, when all is stored in `fmt`."""
    modules = dict.fromkeys(stored_modules(profile), fmt)
    return {u: {r.code for r in found} for u, found in storage_reasons(profile, modules, **LIMITS).items()}


def texts(profile, fmt, unit):
    found = storage_reasons(profile, dict.fromkeys(stored_modules(profile), fmt), **LIMITS)
    return " / ".join(r.text for r in found[unit])


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 32, generator=generator), torch.randn(64, 8, generator=generator)


# Truth: parameters really stored low


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0])
def test_swallowed_share_holds_for_parameters_really_stored_in_16_bits_and_stepped_by_sgd(tmp_path, fmt, lr):
    model, (x, y) = net(), batch()
    dtype = DTYPES[fmt]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    loss = (model(x) - y).square().mean()
    gradients = [g.to(dtype) for g in torch.autograd.grad(loss, list(model.parameters()))]
    stored = [p.detach().to(dtype).requires_grad_() for p in model.parameters()]
    before = [p.detach().clone() for p in stored]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        model(x)
        for p, q, g in zip(model.parameters(), stored, gradients, strict=True):
            p.grad, q.grad = g.float(), g
        optimizer.step()
        rec.step()
    torch.optim.SGD(stored, lr=lr).step()
    profile = Profile.load(tmp_path / "run")
    for (name, _), old, new in zip(model.named_parameters(), before, stored, strict=True):
        module, _, tensor = name.rpartition(".")
        counts, unchanged, from_zero = profile.ratios[profile.sites.index(Site(module, Role.UPDATE, 0, tensor))]
        lo, hi = swallowed_share(counts, get_format(fmt).precision, unchanged=unchanged, from_zero=from_zero)
        moved = dict(model.named_parameters())[name].detach() != old.float()  # fp32 itself swallows the smallest
        real = ((new.detach() == old) & moved).double().mean().item()
        subnormal = (old.float().abs() < get_format(fmt).smallest_normal).double().mean().item()
        assert lo - subnormal <= real <= hi + subnormal, (name, lo, real, hi)


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_swallowed_share_holds_for_adam_with_16_bit_parameters_and_state(tmp_path, fmt, lr):
    """State in 16 bits moves the size of a step by an ulp or two: one part in a hundred of slack."""
    model, (x, y) = net(), batch()
    dtype = DTYPES[fmt]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    stored = [p.detach().to(dtype).requires_grad_() for p in model.parameters()]
    before = [p.detach().clone() for p in stored]
    settings = {"lr": lr, "eps": 1e-4}
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        (100 * (model(x) - y).square().mean()).backward()  # squares of gradients that fp16 holds
        for p, q in zip(model.parameters(), stored, strict=True):
            q.grad = p.grad.to(dtype)
        optimizer.step()
        rec.step()
    torch.optim.Adam(stored, **settings).step()
    profile = Profile.load(tmp_path / "run")
    for name in ("0.weight", "2.weight"):
        site = Site(name[0], Role.UPDATE, 0, "weight")
        counts, unchanged, from_zero = profile.ratios[profile.sites.index(site)]
        lo, hi = swallowed_share(counts, get_format(fmt).precision, unchanged=unchanged, from_zero=from_zero)
        index = [n for n, _ in model.named_parameters()].index(name)
        real = (stored[index].detach() == before[index]).double().mean().item()
        assert lo - 0.01 <= real <= hi + 0.01, (name, lo, real, hi)


def test_energy_that_is_swallowed_is_that_of_the_updates_storage_loses(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-4)
    direction = torch.randn(64, 64)
    profile = train(tmp_path / "run", model, optimizer, lambda: (model.weight * direction).sum(), steps=1, every=1)
    update = model.weight.detach() - before
    low = before.bfloat16()
    lost = update[(low.float() + update).bfloat16() == low]
    truth = float(lost.square().sum() / update.square().sum())
    energy = Evidence(profile).swallowed_energy(Site("", Role.UPDATE, 0, "weight"), get_format("bf16"))
    assert energy == pytest.approx(truth, rel=1e-4) and 0.02 < truth < 0.98


# What must be told, and what must not


def test_a_small_learning_rate_is_told_with_number_limit_and_way_out(tmp_path):
    model, (x, y) = net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    profile = train(tmp_path / "run", model, optimizer, lambda: (model(x) - y).square().mean(), steps=10)
    assert "swallowed" in codes(profile, "bf16")["0"] & codes(profile, "bf16")["2"]
    text = texts(profile, "bf16", "0")
    assert "weight" in text and "half an ulp in bf16" in text and "larger learning rate" in text


def test_converging_training_whose_last_updates_are_swallowed_is_left_alone(tmp_path):
    """Late updates are tiny and mostly swallowed; stored in bf16, the model loses nothing by it."""
    model, (x, _) = net(), batch()
    y = net(3)(x).detach()
    loss = lambda m: (m(x.to(m[0].weight.dtype)).float() - y).square().mean()  # noqa: E731
    low = copy.deepcopy(model).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    profile = train(tmp_path / "run", model, optimizer, lambda: loss(model), steps=300, every=10)
    index = profile.sites.index(Site("0", Role.UPDATE, 0, "weight"))
    counts, unchanged, from_zero = profile.ratios[index]
    assert swallowed_share(counts, 7, unchanged=unchanged, from_zero=from_zero)[0] > 0.5
    assert codes(profile, "bf16") == {}
    start, optimizer = loss(low).item(), torch.optim.SGD(low.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(low).backward()
        optimizer.step()
    assert loss(low).item() < 0.1 * start


def test_norm_weights_that_stay_one_in_bf16_do_not_forbid_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    x, y = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    profile = train(tmp_path / "run", model, optimizer, lambda: (model(x) - y).square().mean(), steps=20)
    norm = Site("1", Role.UPDATE, 0, "weight")
    assert Evidence(profile).swallowed_energy(norm, get_format("bf16")) > 0.9
    assert codes(profile, "bf16") == {}


class WithCopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.copy = nn.Linear(16, 4), nn.Linear(16, 4).requires_grad_(False)
        nn.init.constant_(self.net.weight, 1.0)
        self.copy.load_state_dict(self.net.state_dict())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(("momentum", "fmt", "told"), [
    (0.001, "bf16", True), (0.001, "fp16", True), (0.3, "bf16", False), (0.3, "fp16", False),
])  # fmt: skip
def test_a_moving_average_that_storage_stops_is_told_and_one_that_moves_is_not(tmp_path, momentum, fmt, told):
    torch.manual_seed(0)
    model = WithCopy()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)

    @torch.no_grad()
    def average(model=model):
        for e, p in zip(model.copy.parameters(), model.net.parameters(), strict=True):
            e.lerp_(p.to(e.dtype), momentum)

    low = copy.deepcopy(model.copy).to(DTYPES[fmt])
    with torch.no_grad():
        profile_start = [e.detach().float().clone() for e in low.parameters()]

    def after():
        average()
        with torch.no_grad():
            for e, p in zip(low.parameters(), model.net.parameters(), strict=True):
                e.lerp_(p.to(e.dtype), momentum)

    def loss():
        x = torch.randn(16, 16)
        return (model(x) - 1.4 * x.sum(1, keepdim=True) - torch.randn(16, 4)).square().mean()

    profile = train(tmp_path / "run", model, optimizer, loss, steps=200, every=10, after=after)
    assert stored_modules(profile) == ["net", "copy"] and not any(s.role is Role.OUTPUT and s.module == "copy" for s in
                                                                   profile.sites)  # fmt: skip
    assert codes(profile, fmt).get("copy", set()) == ({"swallowed"} if told else set())
    assert "net" not in codes(profile, fmt)
    truth = model.copy.weight.detach()
    missed = (low.weight.float() - truth).norm() / (truth - profile_start[0]).norm()
    assert (missed > 0.3) == told  # that copy really was left behind
    if told:
        assert "left behind" in texts(profile, fmt, "copy") and "round stochastically" in texts(profile, fmt, "copy")


def test_running_statistics_are_updates_and_the_usual_momentum_is_no_harm(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss():
        x = torch.randn(64, 32, generator=generator)
        return (model(x) - x[:, :8]).square().mean()

    profile = train(tmp_path / "run", model, optimizer, loss, steps=100)
    assert Site("1", Role.UPDATE, 0, "running_var") in profile.sites
    assert profile.sites.index(Site("1", Role.UPDATE, 0, "running_mean")) in profile.ratios
    assert codes(profile, "bf16") == {} == codes(profile, "fp16")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1  # a new tensor each time
        return self.fc(x)


def test_a_counter_in_a_float_buffer_is_told_where_it_will_stop(tmp_path):
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    profile = train(tmp_path / "run", model, optimizer, lambda: model(torch.ones(2, 4)).square().mean(), steps=30)
    assert codes(profile, "bf16")[""] == {"frozen"}
    assert "stops counting at 256" in texts(profile, "bf16", "")
    count = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(300):
        count += 1
    assert count.item() == 256


def test_unchanged_buffers_and_frozen_parameters_have_no_update_rows(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    model[0].register_buffer("table", torch.ones(3))
    x, y = batch()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    profile = train(tmp_path / "run", model, optimizer, lambda: (model(x) - y).square().mean(), steps=4, every=1)
    assert {s.module for s in profile.sites if s.role is Role.UPDATE} == {"2"}


def test_parameters_stepped_by_hand_have_update_rows(tmp_path):
    model, (x, y) = net(), batch()

    def step():
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    profile = train(tmp_path / "run", model, None, lambda: (model(x) - y).square().mean(), steps=4, every=1, after=step)
    assert {str(s) for s in profile.sites if s.role is Role.UPDATE} == {
        "0.update[weight]", "0.update[bias]", "2.update[weight]", "2.update[bias]"
    }  # fmt: skip


@pytest.mark.parametrize(("decay", "told"), [(1.0, {"bf16"}), (20.0, set()), (1e-3, set())])
def test_weight_decay_that_rounds_away_from_what_has_no_gradient(tmp_path, decay, told):
    torch.manual_seed(0)
    model, (x, y) = net(), batch()
    x = torch.where(torch.arange(32) < 16, x, 0.0)  # half of the inputs are dead
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay, eps=1e-4)
    profile = train(tmp_path / "run", model, optimizer, lambda: (model(x) - y).square().mean(), steps=60)
    for fmt in ("bf16", "fp16"):
        assert ("decay" in codes(profile, fmt).get("0", ())) == (fmt in told)
        assert "decay" not in codes(profile, fmt).get("2", ())
        w = torch.full((1,), 0.7, dtype=DTYPES[fmt])
        if fmt in told:
            assert (w * (1 - 1e-3 * decay)).item() == w.item() and "would not decay" in texts(profile, fmt, "0")


def test_eps_that_fp16_rounds_to_zero_is_told_with_one_that_works(tmp_path):
    model, (x, y) = net(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    profile = train(tmp_path / "a", model, optimizer, lambda: (model(x) - y).square().mean() / 64, steps=20)
    assert "eps" in codes(profile, "fp16")["0"] and "eps" not in codes(profile, "bf16").get("0", ())
    assert "eps=1e-08 is itself 0 in fp16" in texts(profile, "fp16", "0") and "eps=0.0001" in texts(
        profile, "fp16", "0"
    )
    advice = optimizer_advice(profile, {"0": "fp16", "2": "fp16"}, storage_reasons(
        profile, {"0": "fp16", "2": "fp16"}, **LIMITS))  # fmt: skip
    assert advice["groups"][0]["state"] == "fp32" and advice["groups"][0]["eps"] == 1e-4
    assert any("eps=1e-08 is 0 in fp16" in w for w in advice["warnings"]) and json.dumps(advice)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
    profile = train(tmp_path / "b", model, optimizer, lambda: (model(x) - y).square().mean() / 64, steps=20)
    assert codes(profile, "fp16") == {}


def test_a_second_moment_that_has_to_fall_is_frozen_in_bf16(tmp_path):
    model, (x, y) = net(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.998))
    size = [100.0]

    def after():
        size[0] = 0.01

    profile = train(
        tmp_path / "run", model, optimizer, lambda: size[0] * (model(x) - y).square().mean(), steps=900, every=100,
        after=after,
    )  # fmt: skip
    assert "frozen" in codes(profile, "bf16")["0"] and "frozen" not in codes(profile, "fp16")["0"]
    v = torch.full((1,), 1.5, dtype=torch.bfloat16)
    assert v.mul(0.998).item() == 1.5 and "cannot fall" in texts(profile, "bf16", "0")


@pytest.mark.parametrize(("passes", "same", "told"), [(300, True, True), (300, False, False), (100, True, False)])
def test_gradients_summed_over_many_passes(tmp_path, passes, same, told):
    """Contributions that point one way stop adding up in bf16 at 256; independent ones do not grow that far."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(0)

    def loss():
        sign = 1.0 if same else torch.randn(2, generator=generator)
        return (model(torch.randn(4, 8, generator=generator) + 3 * same) * sign).sum()

    profile = train(tmp_path / "run", model, optimizer, loss, steps=2, every=1, passes=passes)
    assert Evidence(profile).additions(Site("", Role.UPDATE, 0, "weight")) == passes
    assert ("accumulation" in codes(profile, "bf16").get("", ())) == told
    assert "accumulation" not in codes(profile, "fp16").get("", ())
    if told:
        assert "300 backward passes" in texts(profile, "bf16", "") and "main_grad" in texts(profile, "bf16", "")


def test_run_json_tells_the_optimizers_settings(tmp_path):
    model, (x, y) = net(), batch()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "weight_decay": 0.5}], lr=1e-2
    )
    train(tmp_path / "run", model, optimizer, lambda: (model(x) - y).square().mean(), steps=2)
    (described,) = json.loads((tmp_path / "run" / "run.json").read_text())["optimizers"]
    first, second = described["groups"]
    assert described["class"] == "AdamW" and first["parameters"] == ["0.weight", "0.bias"]
    assert first["lr"] == 1e-3 and second["lr"] == 1e-2 and second["weight_decay"] == 0.5
    assert first["betas"] == [0.9, 0.999] and first["eps"] == 1e-8


def test_watching_the_whole_step_changes_no_number(tmp_path):
    def run(out):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(32, 8)
        if out is None:
            for _ in range(6):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        else:
            train(out, model, optimizer, lambda: model(x).square().mean(), steps=6, every=2)
        return model.state_dict()

    plain, watched = run(None), run(tmp_path / "run")
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def test_what_levels_off_after_a_late_beginning_is_not_carried_on():
    steps = np.arange(60.0)
    late = np.where(steps < 33, 0.0, 2.3 * (1 - 0.7 ** (steps - 32)))
    assert _ahead(steps, late, 1000) == 0.0
    growing = np.where(steps < 33, 0.0, 0.1 * (steps - 32))
    assert _ahead(steps, growing, 1000) == pytest.approx(2.7 + 100.0, rel=0.05)
