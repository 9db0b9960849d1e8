"""The guard's parts: signals, storage, plans, files, settings."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from guarded import growing
from torch import nn

from precscope.errors import RunDirectoryError, UsageError
from precscope.events import EventLog
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.plans.model import Phase
from precscope.training import train
from precscope.training.guard import Event, GuardConfig, read_events
from precscope.training.guard.amending import EVERYTHING, OUTSIDE, Names, Promotion, amended
from precscope.training.guard.signals import Signals
from precscope.training.log import Row

pytestmark = pytest.mark.filterwarnings("ignore:guard, step:RuntimeWarning")


# signals


def rows(*figures: tuple[float, float, float]) -> list[Row]:
    """Of (loss, norm, scale) each."""
    return [
        Row(i, loss, 1e-3, scale, not math.isfinite(norm), not math.isfinite(loss), norm, 1.0, 0)
        for i, (loss, norm, scale) in enumerate(figures)
    ]


def seen(figures, *, scaled=True, **config) -> list[tuple[str, int]]:
    signals = Signals(GuardConfig(**config))
    found = [(signals.see(row, scaled=scaled), row.step) for row in rows(*figures)]
    return [(signal.kind, step) for signal, step in found if signal is not None]


def test_the_first_falls_of_a_loss_scale_are_expected():
    falling = [(1.0, math.inf, 2.0 ** (16 - i)) for i in range(11)]
    assert seen([*falling, *[(1.0, 1.0, 32.0)] * 50]) == []
    assert seen([(1.0, math.inf, 2.0 ** (16 - i)) for i in range(13)]) == [("scale", 11)], "these do not end"


def test_a_settled_loss_scale_that_does_not_recover_is_an_alarm():
    scale, figures = 65536.0, [(1.0, 1.0, 65536.0)] * 30
    for _ in range(6):
        figures += [(1.0, math.inf, scale), (1.0, 1.0, scale / 2)]
        scale /= 2
    assert seen(figures) == [("scale", 40)]
    one = [(1.0, 1.0, 65536.0)] * 30 + [(1.0, math.inf, 131072.0)] + [(1.0, 1.0, 65536.0)] * 30
    assert seen(one * 6) == [], "grows and falls back: that is how a loss scale lives"


def test_a_loss_that_is_not_finite_is_an_alarm_at_once():
    assert seen([(1.0, 1.0, 1.0), (math.nan, math.nan, 1.0)]) == [("overflow", 1)]
    assert seen([(1.0, math.inf, 1.0)], scaled=False) == [("overflow", 0)], "without a loss scale a gradient, too"


def test_a_spike_needs_loss_and_norm_for_several_steps():
    draw = torch.Generator().manual_seed(0)
    quiet = [(1 + 0.1 * a, math.exp(0.2 * b), 1.0) for a, b in torch.randn(80, 2, generator=draw).tolist()]
    spike = (9.0, 60.0, 1.0)
    assert seen(quiet + [spike] * 2 + quiet[:10], scaled=False) == []
    assert seen(quiet + [spike] * 3, scaled=False) == [("spike", 82)]
    assert seen(quiet + [(9.0, 1.0, 1.0)] * 3, scaled=False) == [("suspect", 82)], "worth a look, no more"


def test_state_of_the_signals_goes_through_a_checkpoint():
    draw = torch.Generator().manual_seed(0)
    figures = rows(*((a, abs(b), 8.0) for a, b in torch.randn(90, 2, generator=draw).tolist()))
    signals, later = Signals(GuardConfig()), Signals(GuardConfig())
    for row in figures:
        signals.see(row, scaled=True)
    later.load_state_dict(json.loads(json.dumps(signals.state_dict())))
    assert later.state_dict() == signals.state_dict()


# swallowed updates


def low_storage(lr: float, **more):
    task = growing("middle")
    task.after_step = None
    plan = PrecisionPlan.uniform("bf16", params="bf16")
    return task, {"plan": plan, "steps": 60, "lr": lr, "schedule": "constant", "warmup": 0, **more}


def test_swallowed_updates_move_the_parameters_to_fp32(tmp_path):
    task, settings = low_storage(1e-6)
    result = train(task, guard="promote", out=tmp_path / "run", **settings)
    (event,) = read_events(tmp_path / "run")
    assert (event.kind, event.action) == ("swallowed", "promote") and event.numbers["share"] > 0.5
    assert "below half an ulp" in event.text
    assert result.plan[event.module].params == "fp32" and result.plan[event.module].compute == "bf16"


@pytest.mark.parametrize(("lr", "updates"), [(3e-2, "nearest"), (1e-6, "stochastic")])
def test_storage_that_loses_nothing_raises_no_alarm(lr, updates, tmp_path):
    task, settings = low_storage(lr, updates=updates)
    train(task, guard="promote", out=tmp_path / "run", **settings)
    assert read_events(tmp_path / "run") == []


# plans


def names() -> Names:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    model["again"] = model["b"]
    return Names(model)


def test_a_promotion_leaves_what_is_within_the_module():
    plan = amended(PrecisionPlan.uniform("fp16"), [Promotion("a", "bf16", "why")], names())
    assert {n: plan[n].compute for n in ("", "a", "a.0", "b")} == {"": "fp16", "a": "bf16", "a.0": "fp16", "b": "fp16"}
    assert plan["a"].reasons[0].text == "why"


def test_the_root_the_outside_and_everything_can_be_promoted():
    base = PrecisionPlan.uniform("fp16")
    root = amended(base, [Promotion("", "fp32", "why")], names())
    assert root[""].compute == "fp32" and root["a.0"].compute == "fp16" and root.default.compute == "fp16"
    outside = amended(base, [Promotion(OUTSIDE, "bf16", "why")], names())
    assert outside.default.compute == "bf16" and outside[""].compute == outside["a"].compute == "fp16"
    mixed = base.replace(modules={"a": LayerPrecision("e4m3"), "b": LayerPrecision("fp32")})
    every = amended(mixed, [Promotion(EVERYTHING, "bf16", "why")], names())
    assert (every.default.compute, every["a"].compute, every["b"].compute) == ("bf16", "bf16", "fp32")


def test_all_names_of_a_shared_module_are_promoted():
    plan = amended(PrecisionPlan.uniform("fp16"), [Promotion("again", "fp32", "why")], names())
    assert plan["b"].compute == plan["again"].compute == "fp32"


def test_phases_are_promoted_too_and_never_lowered():
    phases = [Phase(from_step=5, precision="fp32"), Phase(from_step=9, plan=PrecisionPlan.uniform("fp16")),
              Phase(from_step=12, precision="plan")]  # fmt: skip
    base = PrecisionPlan.uniform("fp16").replace(phases=phases)
    plan = amended(base, [Promotion("b", "bf16", "why")], names())
    assert [plan.at_step(s)["b"].compute for s in (0, 5, 9, 12)] == ["bf16", "fp32", "bf16", "bf16"]
    assert [plan.at_step(s)["a"].compute for s in (0, 5, 9, 12)] == ["fp16", "fp32", "fp16", "fp16"]
    assert PrecisionPlan.from_json(plan.to_json()) == plan


# files and settings


def test_events_are_lines_and_a_cut_one_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(Event(3, "spike", "warn", "text", numbers={"x": math.inf}))
    with open(path, "ab") as file:
        file.write(b'{"schema": 1, "step"')
    assert [e.step for e in read_events(tmp_path)] == [3]
    EventLog(path).write(Event(4, "scale", "none", "more"))
    assert [(e.step, e.schema) for e in read_events(path)] == [(3, 1), (4, 1)]
    assert read_events(path)[0].numbers == {"x": "inf"}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(RunDirectoryError, match="line 1, is damaged"):
        read_events(path)
    with pytest.raises(RunDirectoryError, match="precscope train --guard warn"):
        read_events(tmp_path / "elsewhere.jsonl")
    path.write_text('{"schema": 9, "step": 1}\n')
    with pytest.raises(RunDirectoryError, match="schema 9"):
        read_events(path)


def test_events_that_cannot_be_written_are_said_once(tmp_path):
    log = EventLog(tmp_path / "gone" / "events.jsonl")
    with pytest.warns(RuntimeWarning, match="its events are lost"):
        log.write(Event(1, "spike", "warn", "text"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(Event(2, "spike", "warn", "text"))
    assert len(log.events) == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"action": "promot"}, "one of warn, skip, promote, rollback, not 'promot'"),
    ({"window": 0}, "window must be an integer of at least 1"),
    ({"tolerance": 0.0}, "tolerance must be a positive number"),
    ({"quiet_steps": 1.5}, "quiet_steps must be an integer"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        GuardConfig(**settings)
    assert GuardConfig(quiet_steps=None, dense_steps=0).action == "warn"
