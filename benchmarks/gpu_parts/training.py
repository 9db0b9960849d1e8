"""Training in each precision: from the same start on the same data, and single steps in turn for the time."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

import precscope as ps
from precscope.training import make_precision

from .advising import PLANS, plan_of
from .setting import Setting

SWITCHED = ("fp32", "tf32")
"""What TF32's switch, one of the whole process, tells apart: set around their own steps alone."""


def contenders(setting: Setting) -> dict[str, dict[str, Any]]:
    """Name -> how `ps.train` is told. "all e4m3": every linear module in 8 bits, whatever advice said."""
    asked: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}}
    if setting.cuda:
        asked |= {"tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}}
    asked["bf16"] = {"precision": "bf16"}
    for name in PLANS:
        if (path := plan_of(setting, name)) is not None:
            asked[name] = {"plan": ps.PrecisionPlan.load(path)}
    asked["all e4m3"] = {"plan": ps.PrecisionPlan(default="bf16", modules={"blocks.*": "e4m3"})}
    return asked


def training(setting: Setting) -> None:
    """Curves and held-out loss from `ps.train`; ms per step from steps in turn."""
    runs: dict[str, Any] = {}
    for name, how in contenders(setting).items():
        try:
            result = ps.train(setting.task(), steps=setting.steps, lr=3e-4, device=setting.device, **how)
            runs[name] = {
                **result.to_dict(),
                "losses": list(result.losses),
                "tokens_per_second": 1e3 * setting.tokens / result.step_time_ms,
                "scale_history": list(result.scale_history),
                "notes": list(result.notes),
            }
        except Exception as error:  # the others may train
            runs[name] = {"error": f"{type(error).__name__}: {error}"}
        setting.keep(runs=runs)
        if setting.cuda:
            torch.cuda.empty_cache()
    setting.keep(in_turn=in_turn(setting, compile=False))


def compiled(setting: Setting) -> None:
    """The same steps in turn under torch.compile."""
    if not setting.cuda and not setting.quick:
        setting.keep(skipped="a rehearsal: the compiler of CPU code may be missing")
        return
    setting.keep(in_turn=in_turn(setting, compile=True, skip=SWITCHED))


class Runner:
    """One precision, ready for single steps; as the bundled trainer goes about them."""

    def __init__(self, setting: Setting, how: dict[str, Any], compile: bool) -> None:
        self.task = setting.task()
        model = self.task.model
        self.mode = make_precision(
            how.get("precision"), plan=how.get("plan"), model=model, device=setting.device, growth_interval=2000
        )
        self.stack = contextlib.ExitStack()
        self.around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if how.get("precision") in SWITCHED:
            self.around = functools.partial(self.mode.applied, model)
        else:
            self.stack.enter_context(self.mode.applied(model))
        handle = getattr(self.mode, "handle", None)
        self.runs = handle.describe().splitlines()[:20] if handle is not None else []
        self.model = torch.compile(model) if compile else model
        self.mode.compiled = compile
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.batches = [tuple(t.to(setting.device) for t in self.task.batch(i)) for i in range(4)]
        self.at = 0

    def step(self) -> None:
        with self.around():
            self._step()

    def _step(self) -> None:
        with self.mode.forward_context():
            loss = self.task.loss(self.model, self.batches[self.at % 4])
        self.mode.backward(loss)
        self.mode.unscale(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.task.model.parameters() if p.grad is not None])
        self.mode.step(self.optimizer, norm.isfinite())
        self.optimizer.zero_grad()
        self.at += 1


def in_turn(setting: Setting, *, compile: bool, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """ms per step: each turn gives every precision one step, with TF32's switch as it asks for it."""
    runners: dict[str, Runner] = {}
    failed: dict[str, str] = {}
    for name, how in contenders(setting).items():
        if name in skip:
            continue
        try:
            runners[name] = Runner(setting, how, compile)
            for _ in range(3):
                runners[name].step()
            setting.wait()
        except Exception as error:  # the others may run
            runners.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        setting.keep(**{"ready": list(runners), "failed": failed})
    times: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for turn in range(setting.count(30, 3)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(setting.ms(runners[name].step))
    found = {name: _figures(setting, values, runners[name].runs) for name, values in times.items()}
    for runner in runners.values():
        runner.stack.close()
    return {"steps": found, "failed": failed}


def _figures(setting: Setting, values: list[float], runs: list[str]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    rate = 1e3 * setting.tokens / middle
    return {"ms": middle, "low_ms": low, "high_ms": high, "tokens_per_second": rate, "runs": runs}
