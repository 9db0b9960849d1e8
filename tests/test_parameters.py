"""Parameters in bf16 and fp16 that learn: rounding, compensation, master weights, stored state, resume, the advice."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import precscope as ps
from precscope.errors import UsageError
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.training.narrowing import (
    cut_off,
    put_together,
    restore_state,
    round_stochastically,
    round_together,
    store_state,
)
from precscope.training.parameters import LowPrecisionOptimizer

BF16, FP16 = torch.bfloat16, torch.float16
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def net(dtype=torch.float32, width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 16)).to(dtype)


def step_loss(model, step, dtype):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
    return (model(x).float() - x.float().roll(1, 1)).square().mean()


def train(model, optimizer, *, begin=0, end=10, dtype=BF16):
    for step in range(begin, end):
        step_loss(model, step, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Rounding


def neighbours(x, dtype):
    """The values of `dtype` on both sides of the float x (twice x where it is one), found by stepping bit patterns."""
    near = torch.tensor(x, dtype=torch.float64).to(dtype)
    bits = near.view(torch.int16)
    around = [float((bits + d).view(dtype)) for d in (-1, 0, 1)] if x else [0.0]
    return max(v for v in around if v <= x), min(v for v in around if v >= x)


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_to_bf16_gives_a_neighbour_and_the_value_on_average(x, negative, seed):
    x = -x if negative else x
    n = 4096
    y = round_stochastically(torch.full((n,), x), BF16, torch.Generator().manual_seed(seed)).double()
    low, high = neighbours(x, BF16)
    assert set(y.unique().tolist()) <= {low, high}
    if low < high:
        share = (x - low) / (high - low)  # of the draws that should go up; 6 standard deviations
        up = float((y == high).double().mean())
        assert abs(up - share) <= 6 * math.sqrt(share * (1 - share) / n) + 1e-12


@pytest.mark.parametrize(
    ("x", "dtype"), [(1 + 2**-9, BF16), (1e-39, BF16), (1 + 2**-13, FP16), (-3.3e-6, FP16), (2.0**-24 * 0.3, FP16)]
)
def test_the_mean_of_many_draws_is_the_value_in_subnormal_binades_too(x, dtype):
    value = torch.full((1 << 18,), x)
    y = round_stochastically(value, dtype, torch.Generator().manual_seed(1)).double()
    spacing = float(y.max() - y.min())
    assert spacing > 0 and abs(float(y.mean()) - float(value[0])) <= 6 * 0.5 * spacing / 512


def test_specials_and_exact_values_pass_unrounded():
    x = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 2.0**-133])
    y = round_stochastically(x.repeat(100), BF16, torch.Generator().manual_seed(0)).float().view(100, -1)
    assert all(torch.equal(row[:-2], x[:-2]) and row[5].isnan() and row[6] == x[6] for row in y)
    assert torch.signbit(y[:, 1]).all()


def test_rounding_together_is_rounding_each_shape_and_dtype():
    tensors = [torch.randn(3, 5), torch.randn(7), torch.tensor(1.001), torch.randn(2, 2)]
    dtypes = [BF16, FP16, BF16, BF16]
    rounded = round_together(tensors, dtypes, torch.Generator().manual_seed(0))
    for x, y, dtype in zip(tensors, rounded, dtypes, strict=True):
        assert y.shape == x.shape and y.dtype is dtype
        ulp = torch.finfo(dtype).eps * x.abs()
        assert ((y.float() - x).abs() <= 1.001 * ulp).all()


def test_the_global_generator_is_left_alone():
    model = net(BF16)
    optimizer = LowPrecisionOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), updates="stochastic", state="bf16")
    step_loss(model, 0, BF16).backward()
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


# Each way of writing updates against an oracle


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_master_weights_equal_a_hand_written_loop_with_separate_masters(name):
    """The parameters are the rounding of masters that the bare optimizer trains on the same bf16 gradients."""
    ours, other = net(BF16), net(BF16)
    optimizer = LowPrecisionOptimizer(OPTIMIZERS[name](ours.parameters()), updates="master")
    train(ours, optimizer)
    masters = [p.detach().float().requires_grad_() for p in other.parameters()]
    bare = OPTIMIZERS[name](masters)
    for step in range(10):
        step_loss(other, step, BF16).backward()
        for p, m in zip(other.parameters(), masters, strict=True):
            m.grad = p.grad.float()
            p.grad = None
        bare.step()
        with torch.no_grad():
            for p, m in zip(other.parameters(), masters, strict=True):
                p.copy_(m)
    assert same(ours.parameters(), other.parameters())
    assert same([optimizer.state[p]["master"] for p in ours.parameters()], masters)
    for p, m in zip(ours.parameters(), masters, strict=True):
        for key, value in bare.state[m].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("updates", ["nearest", "stochastic", "kahan", "master"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW fused"])
def test_fp32_parameters_train_bit_for_bit_as_without_the_wrapper(name, updates):
    ours, bare = net(), net()
    train(ours, LowPrecisionOptimizer(OPTIMIZERS[name](ours.parameters()), updates=updates), dtype=torch.float32)
    train(bare, OPTIMIZERS[name](bare.parameters()), dtype=torch.float32)
    assert same(ours.parameters(), bare.parameters())


def one_parameter(updates, *, value=1.0, step=1e-5, steps=500, dtype=BF16, n=20_000, seed=0):
    p = nn.Parameter(torch.full((n,), value, dtype=dtype))
    optimizer = LowPrecisionOptimizer(torch.optim.SGD([p], lr=step), updates=updates, seed=seed)
    for _ in range(steps):
        p.grad = torch.ones_like(p, dtype=p.grad_dtype)
        optimizer.step()
    return p.detach().double(), optimizer


def test_small_updates_stall_when_rounded_to_nearest_and_add_up_otherwise():
    goal = 1.0 - 500e-5
    assert (one_parameter("nearest")[0] == 1.0).all()
    stochastic, _ = one_parameter("stochastic")
    spread = float(stochastic.std())
    assert spread > 0 and abs(float(stochastic.mean()) - goal) < 6 * spread / math.sqrt(len(stochastic))
    for updates in ("kahan", "master"):
        p, optimizer = one_parameter(updates, n=3)
        assert (p == float(torch.tensor(goal).to(BF16))).all()
        held = optimizer.state[optimizer.param_groups[0]["params"][0]]
        full = held["master"] if updates == "master" else put_together(p.to(BF16), held["compensation"])
        assert (full - goal).abs().max() < 500 * 2**-24  # of the sums in fp32


@given(st.floats(2**-7, 128), st.floats(-20, -7), st.integers(20, 60), st.sampled_from([BF16, FP16]))
@settings(max_examples=40, deadline=None)
def test_kahan_compensation_follows_the_fp64_sum(value, exponent, steps, dtype):
    """bf16 and what it carries are fp32 to an ulp, fp16 and what it carries 19 bits."""
    step = 2.0**exponent * value
    held, optimizer = one_parameter("kahan", value=value, step=step, steps=steps, n=2, dtype=dtype)
    full = put_together(held.to(dtype), optimizer.state[optimizer.param_groups[0]["params"][0]]["compensation"])
    start = float(torch.tensor(value).to(dtype))
    goal = start - steps * float(torch.tensor(step, dtype=torch.float32))
    resolution = 2.0**-23 if dtype is BF16 else 2.0**-19
    assert (full.double() - goal).abs().max() <= (steps + 1) * resolution * 2 * max(abs(start), abs(goal))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_two_halves_are_the_fp32_value_to_an_ulp(numbers):
    full = torch.tensor(numbers)
    again = put_together(full.to(BF16), cut_off(full, full.to(BF16)))
    ties = full.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(again[~ties], full[~ties])
    assert ((again.view(torch.int32) - full.view(torch.int32)).abs() <= 1).all()


def test_kahan_of_bf16_is_master_weights_in_two_bytes():
    """Ties, of which there are none here, are the one thing that tells them apart."""
    models = [net(BF16), net(BF16)]
    optimizers = [
        LowPrecisionOptimizer(OPTIMIZERS["AdamW"](m.parameters()), updates=updates)
        for m, updates in zip(models, ("kahan", "master"), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    assert same(*(m.parameters() for m in models))
    assert optimizers[1].bytes_per_parameter() - optimizers[0].bytes_per_parameter() == pytest.approx(2.0)


def test_the_compensation_takes_two_bytes_and_the_same_seed_rounds_alike():
    for dtype, kept in ((BF16, torch.int16), (FP16, BF16)):
        _, optimizer = one_parameter("kahan", n=4, steps=2, dtype=dtype)
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["compensation"].dtype is kept
    runs = [one_parameter("stochastic", n=500, steps=20, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# Being an optimizer


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("updates", ["nearest", "stochastic", "kahan", "master"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(updates, state):
    whole, first, second = net(BF16), net(BF16), net(BF16)

    def make(model):
        return LowPrecisionOptimizer(OPTIMIZERS["AdamW"](model.parameters()), updates=updates, state=state, seed=5)

    reference = make(whole)
    train(whole, reference, end=12)
    optimizer = make(first)
    train(first, optimizer, end=7)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    resumed = make(second)
    resumed.load_state_dict(saved)
    second.load_state_dict(weights)
    train(second, resumed, begin=7, end=12)
    assert same(whole.parameters(), second.parameters())
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert {k: v.dtype for k, v in resumed.state[q].items()} == {k: v.dtype for k, v in reference.state[p].items()}
        assert all(torch.equal(resumed.state[q][k], v) for k, v in reference.state[p].items())


def test_loading_refuses_another_model_and_takes_the_state_of_the_bare_optimizer():
    model = net(BF16)
    bare = OPTIMIZERS["AdamW"](model.parameters())
    train(model, bare, end=3)
    optimizer = LowPrecisionOptimizer(OPTIMIZERS["AdamW"](model.parameters()), updates="master")
    optimizer.load_state_dict(bare.state_dict())
    train(model, optimizer, begin=3, end=5)
    assert all(int(optimizer.state[p]["step"]) == 5 for p in model.parameters())
    other = LowPrecisionOptimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(ValueError, match="size of optimizer's group"):
        other.load_state_dict(optimizer.state_dict())


def test_schedules_and_later_groups_reach_the_optimizer_inside():
    model = net(BF16)
    *body, head = model.children()
    optimizer = LowPrecisionOptimizer(torch.optim.SGD(nn.Sequential(*body).parameters(), lr=1.0), updates="master")
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, end=1)
    assert same(before, model.parameters())  # all learning rates are 0 now
    optimizer.param_groups[1]["lr"] = 0.5
    train(model, optimizer, end=1)
    schedule.step()
    assert same(before[:-2], nn.Sequential(*body).parameters())
    assert not torch.equal(before[-2], head.weight)


def test_the_optimizer_that_was_given_is_left_alone_and_its_state_goes_on():
    model = net()
    bare = OPTIMIZERS["AdamW"](model.parameters())
    train(model, bare, end=2, dtype=torch.float32)
    model.to(BF16)
    optimizer = LowPrecisionOptimizer(bare, updates="kahan")
    train(model, optimizer, end=1)
    assert all(int(bare.state[p]["step"]) == 2 and int(optimizer.state[p]["step"]) == 3 for p in model.parameters())
    assert bare.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.parametrize("updates", ["kahan", "master"])
def test_changes_from_outside_are_kept_and_the_rest_goes_on(updates):
    p = nn.Parameter(torch.ones(4, dtype=BF16))
    optimizer = LowPrecisionOptimizer(torch.optim.SGD([p], lr=1e-3), updates=updates)

    def step():
        p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    with torch.no_grad():
        p[0] = 2.0
    for _ in range(7):
        step()
    assert p.tolist() == [2.0 - 2**-7, *[1.0 - 2**-7] * 3]  # 8 steps of 1e-3 from 1; 7 from 2, to the nearest 2^-7


@pytest.mark.parametrize("updates", ["stochastic", "kahan", "master"])
def test_parameters_may_change_their_dtype_between_steps(updates):
    p = nn.Parameter(torch.ones(50, dtype=BF16))
    optimizer = LowPrecisionOptimizer(torch.optim.SGD([p], lr=1e-4), updates=updates)
    for dtype in (BF16, torch.float32, BF16):
        p.grad = None
        p.data = p.data.to(dtype)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        if dtype is torch.float32:
            assert abs(float(p.detach().mean()) - (1 - 20e-4)) < (1e-3 if updates == "stochastic" else 1e-5)
            assert "master" not in optimizer.state[p] and "compensation" not in optimizer.state[p]


def test_fp16_gradients_are_kept_in_fp32_so_that_unscaling_flushes_none():
    p = nn.Parameter(torch.ones(8, dtype=FP16))
    optimizer = LowPrecisionOptimizer(torch.optim.SGD([p], lr=1.0), updates="master")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(2):
        scaler.scale((p.float() * 1e-8).sum()).backward()  # scaled: 4e-5; unscaled, fp16 would flush it
        scaler.unscale_(optimizer)
        assert p.grad.dtype is torch.float32 and torch.allclose(p.grad, torch.full((8,), 1e-8), rtol=1e-3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    expected = torch.tensor(1.0) - torch.tensor(1e-8)
    assert torch.allclose(optimizer.state[p]["master"], expected - 1e-8, atol=1e-9)


def test_a_scaler_that_meets_inf_leaves_all_as_it_is():
    model = net(FP16)
    optimizer = LowPrecisionOptimizer(OPTIMIZERS["AdamW"](model.parameters()), updates="kahan")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in model.parameters()]
    scaler.scale(step_loss(model, 0, FP16)).backward()
    scaler.step(optimizer)
    assert same(before, model.parameters()) and not optimizer.state


def test_many_gradients_of_bf16_parameters_add_up_in_fp32_where_asked():
    p = nn.Parameter(torch.ones(2, dtype=BF16))
    optimizer = LowPrecisionOptimizer(torch.optim.SGD([p], lr=1.0), gradients="fp32")
    for _ in range(1000):
        (p * 0.001).sum().backward()
    assert torch.allclose(p.grad, torch.ones(2), rtol=5e-3)  # 0.001 is 0.00100 in bf16; a bf16 sum stops near 0.25
    optimizer.zero_grad()
    assert p.grad is None


def test_memory_between_steps_is_that_of_the_method():
    for updates, state, expected in (("nearest", "fp32", 10), ("stochastic", "bf16", 6), ("kahan", "bf16", 8),
                                     ("master", "fp32", 14)):  # fmt: skip
        model = net(BF16)
        optimizer = LowPrecisionOptimizer(OPTIMIZERS["AdamW"](model.parameters()), updates=updates, state=state)
        train(model, optimizer, end=1)
        assert optimizer.bytes_per_parameter() == pytest.approx(expected, rel=0.05)
        assert all(s.numel() == 0 for s in optimizer._stand_ins.values()) or updates == "master"
        assert f"updates {'with Kahan' if updates == 'kahan' else ''}" in optimizer.notes[0]


def test_wrong_words_and_optimizers_are_refused_in_one_sentence():
    p = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UsageError, match="updates must be one of nearest, stochastic, kahan, master, not 'up'"):
        LowPrecisionOptimizer(torch.optim.SGD(p), updates="up")
    with pytest.raises(UsageError, match="optimizer state cannot be stored in 'fp4'; allowed: fp32, bf16, int8"):
        LowPrecisionOptimizer(torch.optim.SGD(p), state="fp4")
    with pytest.raises(UsageError, match="LBFGS cannot be wrapped"):
        LowPrecisionOptimizer(torch.optim.LBFGS(p))
    with pytest.raises(UsageError, match="gradients must be 'param' or 'fp32'"):
        LowPrecisionOptimizer(torch.optim.SGD(p), gradients="bf16")


# State


def test_a_second_moment_in_bf16_decays_since_it_is_rounded_stochastically():
    p = nn.Parameter(torch.ones(4096, dtype=BF16))
    settings_ = {"lr": 0.0, "betas": (0.9, 0.999)}
    optimizer = LowPrecisionOptimizer(torch.optim.Adam([p], **settings_), state="bf16")
    p.grad = torch.ones_like(p)
    optimizer.step()
    begin = optimizer.state[p]["exp_avg_sq"].double().mean()
    assert optimizer.state[p]["exp_avg_sq"].dtype is BF16
    for _ in range(300):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].double().mean() / begin == pytest.approx(0.999**300, rel=0.01)


@pytest.mark.parametrize(("state", "error"), [("int8", 0.05), ("fp8", 0.05), ("int4", 0.5)])
def test_state_in_blocks_is_close_small_and_loads_safely(state, error):
    pytest.importorskip("torchao.optim")
    p = nn.Parameter(torch.zeros(64, 128, dtype=BF16))
    like = torch.zeros(64, 128)
    value = torch.rand(64, 128) + 0.1
    (stored,) = store_state([("exp_avg_sq", value, like)], state, torch.Generator())
    assert ((restore_state(stored) - value).abs() / value).mean() < error
    optimizer = LowPrecisionOptimizer(torch.optim.AdamW([p], lr=1e-3), state=state)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.bytes_per_parameter() < 2 + 2 * (1.2 if state != "int4" else 0.7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = LowPrecisionOptimizer(torch.optim.AdamW([p], lr=1e-3), state=state)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restore_state(again.state[p]["exp_avg"]), restore_state(optimizer.state[p]["exp_avg"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile and torchao, about themselves
def test_torchaos_own_optimizers_agree_and_can_be_wrapped():
    """Theirs need torch.compile and a C++ compiler; ours store state in their format without one."""
    optim = pytest.importorskip("torchao.optim")
    results = {}
    for name in ("theirs", "ours", "wrapped"):
        model = net(BF16, width=256)
        theirs = optim.AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.1)
        optimizer = {
            "theirs": lambda o=theirs: o,
            "wrapped": lambda o=theirs: LowPrecisionOptimizer(o, updates="master"),
            "ours": lambda m=model: LowPrecisionOptimizer(
                torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1), updates="nearest", state="int8"
            ),
        }[name]()
        train(model, optimizer, end=10)
        results[name] = float(step_loss(model, 0, BF16))
    assert results["ours"] == pytest.approx(results["theirs"], rel=0.02)
    assert results["wrapped"] == pytest.approx(results["theirs"], rel=0.02)


# The recorder


@pytest.mark.parametrize("updates", ["nearest", "stochastic", "master"])
def test_the_recorder_sees_the_updates_of_the_real_parameters(updates, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(BF16)
    optimizer = LowPrecisionOptimizer(torch.optim.Adam(model.parameters(), lr=1e-5), updates=updates)
    changed = elements = 0
    with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        for step in range(4):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(BF16)
            before = model.weight.detach().clone()
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            changed += int((model.weight != before).sum())
            elements += before.numel()
            rec.step()
    profile = Profile.load(tmp_path / "run")
    row = profile.sites.index(Site("", Role.UPDATE, 0, "weight"))
    table = profile.table
    assert table.count[row] == elements and table.count[row] - table.zeros[row] == changed
    assert changed < 0.03 * elements if updates == "nearest" else changed > 0.03 * elements
    states = {s.tensor for s in profile.sites if s.role is Role.STATE and s.call == 0}
    assert {"weight.exp_avg", "weight.exp_avg_sq"} <= states and ("weight.master" in states) == (updates == "master")
    (described,) = profile.run["optimizers"]
    assert described["groups"][0]["parameters"] == ["weight"] and described["groups"][0]["lr"] == 1e-5
