"""From ranges and costs to a plan: constraints, the linear program, reasons."""

from __future__ import annotations

import itertools
import time

import models
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precscope.advice import Limits, recommend
from precscope.advice.cost import CostTable, save
from precscope.advice.measurement import measure
from precscope.advice.solve import Problem, solve
from precscope.errors import FormatError, UsageError
from precscope.profiles import Profile
from precscope.recording import record
from precscope.recording.flops import count_flops


class Net(nn.Module):
    """Three linear layers; `gain` makes the middle one's output large."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        with torch.no_grad():
            self.b.weight.mul_(gain)

    def forward(self, x):
        return self.c(self.norm(self.b(torch.tanh(self.a(x)))))


def recorded(path, model, *, batches=4, scale_loss=1.0, optimizer=None):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    flops = count_flops(model, lambda: model(x))
    with record(model, path, every=1, optimizer=optimizer) as rec:
        rec.flops = flops
        for _ in range(batches):
            (model(x).pow(2).mean() * scale_loss).backward()
            if optimizer is not None:
                optimizer.step()
            rec.step()
    return Profile.load(path)


def net(gain=1.0):
    torch.manual_seed(0)
    return Net(gain)


def test_healthy_model_goes_low_everywhere(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net()), costs="model")
    assert {plan[n].compute for n in ("a", "b", "norm", "c")} == {"fp16"}
    assert plan.loss_scale["interval"][0] <= np.log2(plan.loss_scale["initial"]) <= plan.loss_scale["interval"][1]
    assert plan.confirmed is None and "predicted" in str(plan)
    assert plan.made_from["low_precision_flops_share"] == 1.0


def test_overflowing_layer_is_kept_out_of_fp16_with_numbers(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net(3e5)), formats=("fp16", "fp32"), costs="model")
    assert plan["b"].compute == "fp32"
    assert {plan[n].compute for n in ("a", "c")} == {"fp16"}
    reason = next(r for r in plan["b"].reasons if r.code == "overflow")
    assert "65504" in reason.text and reason.numbers["amax"] > 65504 and reason.site.startswith("b.")
    with_bf16 = recommend(tmp_path / "run", costs="model")
    assert with_bf16["b"].compute == "bf16"


def test_head_room_is_asked_for(tmp_path):
    model = net()
    profile = recorded(tmp_path / "run", model)
    amax = profile.ask("fp16").query("module == 'b' and role == 'output'").amax.iloc[0]
    near = recorded(tmp_path / "near", net(30000 / amax))  # within a binade and a half of the end
    plan = recommend(near, formats=("fp16", "fp32"), costs="model")
    assert plan["b"].compute == "fp32" and "binades below the end of fp16" in plan["b"].reasons[0].text
    assert recommend(near, formats=("fp16", "fp32"), costs="model", limits=Limits(headroom=0))["b"].compute == "fp16"


def test_a_loss_scale_is_found_for_tiny_gradients(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net(), scale_loss=2.0**-30), costs="model")
    assert plan["a"].compute == "fp16"
    assert plan.loss_scale["initial"] >= 2.0**17 and plan.loss_scale["interval"][0] > 0


def test_gradients_that_fit_no_common_scale(tmp_path):
    """One layer's gradients are 2^60 larger than the others': it must leave, the others stay."""

    class Gap(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.small(x) * 2.0**-30, self.large(x) * 2.0**30

    torch.manual_seed(0)
    model = Gap()
    x = torch.randn(64, 16)
    flops = count_flops(model, lambda: model(x))
    with record(model, tmp_path / "run", every=1) as rec:
        rec.flops = flops
        a, b = model(x)
        (a.sum() + b.sum()).backward()
        rec.step()
    plan = recommend(tmp_path / "run", formats=("fp16", "fp32"), costs="model")
    assert sorted(plan[n].compute for n in ("small", "large")) == ["fp16", "fp32"]
    out = next(n for n in ("small", "large") if plan[n].compute == "fp32")
    assert any(r.code == "gradient" and "loss scale" in r.text for r in plan[out].reasons)


def test_nonfinite_values_forbid(tmp_path):
    model = net()
    with record(model, tmp_path / "run", every=1) as rec:
        model(torch.full((4, 16), float("inf")))
        rec.step()
    plan = recommend(tmp_path / "run", costs="model")
    assert plan["a"].compute == "fp32"
    assert any(r.code == "nonfinite" for r in plan["a"].reasons)


def test_cast_policy_keeps_params_fp32_where_updates_are_swallowed(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model.a.parameters(), "lr": 1e-7}, {"params": model.c.parameters(), "lr": 1.0}]
    )
    profile = recorded(tmp_path / "run", model, optimizer=optimizer)
    plan = recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model")
    assert plan["a"].params == "fp32" and plan["c"].params == "bf16"
    assert any(r.code == "swallowed" and "half an ulp" in r.text for r in plan["a"].reasons)
    assert recommend(profile, formats=("bf16", "fp32"), costs="model")["c"].params == "fp32"  # autocast: masters


def test_tied_weights_agree(tmp_path):
    torch.manual_seed(0)
    model = models.Tied()
    x = models.batch(0)[0]
    flops = count_flops(model, lambda: model(x))
    with record(model, tmp_path / "run", every=1) as rec:
        rec.flops = flops
        model(x).pow(2).sum().backward()
        rec.step()
    plan = recommend(tmp_path / "run", costs="model")
    assert plan["emb"].compute == plan["head"].compute


def test_low_precision_that_does_not_pay_is_not_chosen(tmp_path):
    profile = recorded(tmp_path / "run", net())
    rows = [
        {"module": m, "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-6}
        for m in ("a", "b", "norm", "c")
        for f, t in (("fp32", 1.0), ("bf16", 0.99), ("fp16", 50.0))
    ]
    save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
    plan = recommend(profile)
    assert {p.compute for p in plan.modules.values()} == {"fp32"}
    assert "bf16 0.99, fp32 1, fp16 50 ms, measured" in plan["a"].reasons[-1].text
    for row in rows:
        if row["format"] == "bf16":
            row["time_ms"] = 0.4
    save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
    assert {p.compute for p in recommend(profile).modules.values()} == {"bf16"}


def test_wrong_arguments(tmp_path):
    profile = recorded(tmp_path / "run", net(), batches=1)
    with pytest.raises(FormatError, match="unknown format 'fp17'"):
        recommend(profile, formats=("fp17",))
    with pytest.raises(UsageError, match="a plan cannot compute in e2m1"):
        recommend(profile, formats=("e2m1", "fp32"))
    with pytest.raises(UsageError, match="policy must be"):
        recommend(profile, policy="half")
    with pytest.raises(UsageError, match="add fp32 to formats"):
        recommend(recorded(tmp_path / "hot", net(3e5), batches=1), formats=("fp16",))
    (tmp_path / "run" / "graph.json").unlink()
    with pytest.raises(UsageError, match="has no graph.json"):
        recommend(tmp_path / "run")


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_program_finds_what_exhaustive_search_finds(seed):
    rng = np.random.default_rng(seed)
    units, formats = 4, 3
    cost = rng.uniform(0, 10, (units, formats))
    allowed = rng.random((units, formats)) < 0.8
    allowed[:, 0] = True
    edges = [(a, b, float(rng.uniform(0, 4))) for a, b in itertools.combinations(range(units), 2) if rng.random() < 0.6]
    groups = [[0, 2]] if seed % 2 else []
    best = min(
        sum(cost[u, f] for u, f in enumerate(pick)) + sum(ms for a, b, ms in edges if pick[a] != pick[b])
        for pick in itertools.product(range(formats), repeat=units)
        if all(allowed[u, f] for u, f in enumerate(pick)) and all(pick[a] == pick[b] for a, b in groups)
    )
    found = solve(Problem([f"u{i}" for i in range(units)], ["x", "y", "z"], cost, allowed, edges, groups))
    assert found.time_ms == pytest.approx(best, rel=1e-6)


def test_two_thousand_units_solve_in_seconds():
    rng = np.random.default_rng(0)
    n = 2000
    problem = Problem(
        units=[f"m{i}" for i in range(n)],
        formats=["fp32", "bf16", "fp16"],
        cost=rng.uniform(0.1, 1, (n, 3)),
        allowed=np.concatenate([np.ones((n, 1), bool), rng.random((n, 2)) < 0.9], axis=1),
        edges=[(i, i + 1, 0.05) for i in range(n - 1)],
    )
    start = time.perf_counter()
    solve(problem)
    assert time.perf_counter() - start < 20  # a guard against explosion, no benchmark


def test_costs_are_measured_and_state_is_left_alone():
    torch.manual_seed(0)
    model = models.Convolutional()
    x = models.batch(0, 16)[0]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    from precscope.preservation import preserved

    with preserved(model):
        table = measure(model, lambda: model(x), ("fp32", "bf16", "fp16", "e4m3"))
    assert set(table.format) == {"fp32", "bf16", "fp16"}
    assert {"conv", "bn", "head", "frozen"} <= set(table.module)
    assert (table.time_ms >= 0).all() and (table[table.module == "conv"].time_ms > 0).all()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_emulated_formats_gain_nothing_and_say_so(tmp_path):
    profile = recorded(tmp_path / "run", net(), batches=1)
    from precscope.advice.units import ModelGraph

    graph = ModelGraph.of(profile)
    rows = [
        {"module": "a", "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-6}
        for f, t in (("fp32", 2.0), ("bf16", 1.0))
    ]
    table = CostTable.of(pd.DataFrame(rows), graph, ("fp32", "bf16", "e4m3"))
    assert table.time_ms["a", "e4m3"] == 2.0 and table.how["a", "e4m3"] == "emulated"
    assert table.how["b", "bf16"] == "model"
