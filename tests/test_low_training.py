"""Training with low-precision parameters from end to end: what the tool says beforehand, what plain storage loses, what
gets it back; plans that carry it; resume; several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import precscope as ps
from precscope.advice.storage import storage_reasons
from precscope.advice.updates import advised_updates
from precscope.errors import PlanError, UsageError
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.training.config import TrainConfig
from precscope.training.optim import make_optimizer, set_lr, storage_plan
from precscope.training.parameters import LowPrecisionOptimizer

LR = 1e-5
SETTINGS = {"lr": LR, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "grad_clip": None}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.fixture(scope="module")
def start():
    """A working point: weights that a short fp32 training found, as bf16 holds them."""
    task = make(None)
    ps.train(task, steps=60, lr=3e-3)
    return {k: v.bfloat16().float() for k, v in task.model.state_dict().items()}


def make(start):
    torch.manual_seed(0)
    model = Net()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(512, 64, generator=generator)
    y = torch.tanh(x @ torch.randn(64, 8, generator=generator) / 4)
    if start is not None:
        model.load_state_dict(start)
    return ps.Task(
        model=model,
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]).float(), batch[1]),
        batches=lambda step: (x, y),
        eval_batches=[(x, y)],
    )


def fine_tune(start, steps=300, **settings):
    return ps.train(make(start), steps=steps, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def profile(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("low") / "run"
    return ps.profile(
        make(start), out=out, steps=20, every=5, precision="fp32", costs=False, shadow_every=None, ops=False, **SETTINGS
    )


def advice(profile, **options):
    return ps.recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model", **options)


# The story


def test_plain_bf16_parameters_stall_at_a_small_learning_rate_and_each_method_reaches_fp32(start, profile):
    plan = advice(profile)
    assert {plan[name].params for name in ("up", "down")} == {"fp32"}
    assert {r.code for name in ("up", "down") for r in plan[name].reasons} >= {"swallowed"}
    assert plan.optimizer["advised_updates"] == "stochastic"
    assert any("updates='stochastic' (2 bytes per parameter) they can be bf16" in w for w in plan.optimizer["warnings"])

    begin = make(start).checked_loss(make(start).batch(0)).item()
    fp32 = fine_tune(start).eval_loss
    assert fp32 < 0.95 * begin
    plain = {u: fine_tune(start, params="bf16", updates=u).eval_loss for u in (None, "nearest")}
    assert all(begin - loss < 0.3 * (begin - fp32) for loss in plain.values()), (begin, fp32, plain)
    for updates, state in (("stochastic", None), ("kahan", None), ("master", None), ("stochastic", "bf16")):
        result = fine_tune(start, params="bf16", updates=updates, state=state)
        assert result.eval_loss == pytest.approx(fp32, rel=0.01), updates
        assert "9352 of 9352 parameters in bf16" in " ".join(result.notes)


def test_a_plan_made_for_such_updates_stores_low_says_why_and_trains(start, profile):
    plan = advice(profile, updates="auto")
    assert plan.optimizer["updates"] == "stochastic" and plan.optimizer["state"] == "bf16"
    for name in ("up", "down"):
        assert plan[name].params == "bf16"
        (said,) = [r.text for r in plan[name].reasons if r.code == "updates"]
        assert "would be swallowed" in said and "the optimizer keeps them (updates='stochastic')" in said
    assert all(group["state"] == "bf16" for group in plan.optimizer["groups"])
    fp32 = fine_tune(start).eval_loss
    result = fine_tune(start, plan=PrecisionPlan.from_json(plan.to_json()))
    assert result.eval_loss == pytest.approx(fp32, rel=0.02)
    assert "rounded stochastically; optimizer state in bf16; 6.0 bytes" in " ".join(result.notes)


def test_nearest_is_no_excuse_and_autocast_may_store_low_too(profile):
    assert advice(profile, updates="nearest")["up"].params == "fp32"
    plan = ps.recommend(profile, formats=("bf16", "fp32"), costs="model", updates="kahan")
    assert plan["up"].policy == "autocast" and plan["up"].params == "bf16" and plan.optimizer["updates"] == "kahan"
    assert ps.recommend(profile, formats=("bf16", "fp32"), costs="model").optimizer == {}
    with pytest.raises(UsageError, match="updates must be one of nearest, stochastic, kahan, master, 'auto' or None"):
        advice(profile, updates="up")


def test_what_an_optimizer_cannot_help_stays_fp32(tmp_path):
    """An EMA copy is not written by the optimizer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Linear(16, 16), "copy": nn.Linear(16, 16).requires_grad_(False)})
    model["copy"].load_state_dict(model["net"].state_dict())
    x = torch.randn(32, 16)

    def average(model, step):
        with torch.no_grad():
            for slow, fast in zip(model["copy"].parameters(), model["net"].parameters(), strict=True):
                slow.lerp_(fast, 1e-3)

    task = ps.Task(
        model=model, loss=lambda m, b: (m["net"](b) - b.roll(1, 1)).square().mean(), batches=[x], after_step=average
    )
    profile = ps.profile(
        task, out=tmp_path / "run", steps=60, precision="fp32", costs=False, shadow_every=None, ops=False, lr=1e-2,
        schedule="constant", warmup=0,
    )  # fmt: skip
    plan = advice(profile, updates="master")
    assert plan["copy"].params == "fp32" and any("copy" in r.site for r in plan["copy"].reasons)
    assert plan["net"].params == "bf16"


@pytest.mark.parametrize(("lr", "bf16", "fp16"), [(1e-2, "nearest", "nearest"), (1e-8, "kahan", "master")])
def test_the_advice_follows_the_size_of_the_updates(start, lr, bf16, fp16, tmp_path):
    profile = ps.profile(
        make(start), out=tmp_path / "run", steps=10, every=5, precision="fp32", costs=False, shadow_every=None,
        ops=False, **{**SETTINGS, "lr": lr},
    )  # fmt: skip
    for name, expected in (("bf16", bf16), ("fp16", fp16)):
        formats = dict.fromkeys(("up", "down"), name)
        found = storage_reasons(profile, formats, swallowed=0.1, flushed_state=2.0, updates="nearest")
        assert advised_updates(profile, {u: ps.get_format(f) for u, f in formats.items()}, found) == expected


# The trainer's settings


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("updates", ["stochastic", "kahan", "master"])
def test_low_parameters_train_under_autocast_and_a_loss_scale(start, precision, updates):
    fp32 = fine_tune(start, steps=100, lr=1e-3).eval_loss
    result = fine_tune(start, steps=100, lr=1e-3, precision=precision, params=precision, updates=updates)
    assert fp32 < 0.01 and result.eval_loss == pytest.approx(fp32, abs=0.001)  # from 0.07


@pytest.mark.parametrize(
    "method", [{"updates": "stochastic", "state": "bf16"}, {"updates": "kahan"}, {"updates": None}]
)
def test_a_resumed_run_is_bit_identical(start, method, tmp_path):
    settings = {**SETTINGS, "lr": 1e-3, "params": "bf16", "checkpoint_every": 7, **method}
    whole, task = make(start), make(start)
    ps.train(whole, steps=20, **settings, out=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(model, step):
        if step == 10:
            raise Stop

    task.after_step = stop
    with pytest.raises(Stop):
        ps.train(task, steps=20, out=tmp_path / "cut", **settings)
    again = make(None)
    ps.train(again, steps=20, out=tmp_path / "cut", resume=True, **settings)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_phases_keep_the_optimizer_while_parameters_change_their_storage(start):
    low = PrecisionPlan.uniform("bf16", params="bf16")
    plan = PrecisionPlan(
        default=LayerPrecision("fp32"),
        optimizer={"updates": "kahan"},
        phases=[{"from_step": 5, "plan": low.replace(optimizer={"updates": "kahan"})},
                {"from_step": 10, "precision": "fp32"}],
    )  # fmt: skip
    result = fine_tune(start, steps=15, lr=1e-3, plan=plan)
    fp32 = fine_tune(start, steps=15, lr=1e-3)
    assert result.eval_loss == pytest.approx(fp32.eval_loss, rel=0.02)


def test_what_is_asked_is_what_is_made(start):
    task = make(start)
    assert type(make_optimizer(task, TrainConfig(steps=1, updates="master"))) is torch.optim.AdamW  # all is fp32
    assert isinstance(make_optimizer(task, TrainConfig(steps=1, state="bf16")), LowPrecisionOptimizer)
    task.model.bfloat16()
    assert type(make_optimizer(task, TrainConfig(steps=1))) is torch.optim.AdamW
    made = make_optimizer(task, TrainConfig(steps=1, updates="kahan", accumulate=4, seed=3))
    assert (made.updates, made.stored, made.gradients, made.seed) == ("kahan", "fp32", "fp32", 3)
    plan = PrecisionPlan.uniform("bf16", params="bf16").replace(optimizer={"updates": "stochastic", "state": "bf16"})
    assert make_optimizer(task, TrainConfig(steps=1), plan).stored == "bf16"
    assert make_optimizer(task, TrainConfig(steps=1, updates="master"), plan).updates == "master"
    with pytest.raises(PlanError, match=r"the plan's optimizer.updates must be one of nearest, stochastic"):
        make_optimizer(task, TrainConfig(steps=1), plan.replace(optimizer={"updates": "up"}))


def test_settings_are_checked_and_a_plan_beside_params_is_refused():
    with pytest.raises(UsageError, match="updates must be one of nearest, stochastic, kahan, master, not 'up'"):
        TrainConfig(steps=1, updates="up")
    with pytest.raises(UsageError, match="params must be one of fp32, bf16, fp16, not 'fp8'"):
        TrainConfig(steps=1, params="fp8")
    config = TrainConfig(steps=1, params="bf16")
    plan, word = storage_plan(None, "fp16", config, initial_scale=8.0)
    assert word is None and plan.default.params == "bf16" and plan.loss_scale == {"initial": 8.0}
    with pytest.raises(UsageError, match="give a plan or params='bf16', not both"):
        storage_plan(plan, None, config)


def test_a_learning_rate_that_is_a_tensor_is_set_in_place():
    group = {"lr": torch.tensor(1.0)}
    held = group["lr"]
    set_lr(group, 0.25)
    assert group["lr"] is held and float(held) == 0.25


# Several processes

SCRIPT = """
    import gc, torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.fsdp import fully_shard
    from precscope.training.parameters import LowPrecisionOptimizer

    dist.init_process_group("gloo")
    rank, options = dist.get_rank(), StateDictOptions(full_state_dict=True)

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6)).bfloat16()

    def train(model, optimizer, begin, end, ranks):
        for step in range(begin, end):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + (rank if ranks else 0)))
            model(x.bfloat16()).float().square().mean().backward()
            optimizer.step(); optimizer.zero_grad()

    def make(model, updates):
        return LowPrecisionOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), updates=updates, state=STATE)

    def compare(updates):
        model = nn.parallel.DistributedDataParallel(net())
        train(model, make(model, updates), 0, 3, ranks=True)
        mine = torch.cat([p.detach().float().flatten() for p in model.parameters()])
        all_of_them = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(all_of_them, mine)
        assert torch.equal(*all_of_them), "replicas drift apart"

        # FSDP2 on the same data on each rank: as one process, for what does not draw random numbers per shard
        one, sharded = net(), fully_shard(net())
        single, optimizer = make(one, updates), make(sharded, updates)
        train(one, single, 0, 4, ranks=False)
        train(sharded, optimizer, 0, 2, ranks=False)
        state = get_optimizer_state_dict(sharded, optimizer, options=options)
        if rank == 0 and updates != "stochastic":
            key = "master" if updates == "master" else "compensation"
            assert state["state"]["0.weight"][key].shape == (16, 8)
        again = make(sharded, updates)
        set_optimizer_state_dict(sharded, again, state, options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True))
        train(sharded, again, 2, 4, ranks=False)
        for p, q in zip(one.parameters(), sharded.parameters(), strict=True):
            if updates != "stochastic":
                assert torch.equal(p, q.full_tensor()), updates
            else:
                assert torch.allclose(p.float(), q.full_tensor().float(), atol=0.05)

    for updates, STATE in (("stochastic", "bf16"), ("kahan", "fp32"), ("master", "fp32")):
        compare(updates)
    gc.collect()  # nothing may hold the group when it ends: gloo's threads would end the process
    dist.barrier()
    print("fine", rank)
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_with_ddp_stay_equal_and_fsdp2_shards_masters_and_resumes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("fine") == 2
