"""What is checked of each architecture: that watching it changes nothing and misses nothing, that plans apply, train
and come off. `architecture_runs.Reference` says what was to be seen.

    result = check(ARCHITECTURES["BERT"], folder); result.faults == []
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architecture_runs import PRECISIONS, SCALE, STEPS, Reference, built, equal, seed, train
from architectures import Architecture
from torch import Tensor, nn

import precscope as ps
from precscope import applying
from precscope.errors import first_line
from precscope.sites import Role

RECORDED = "recorded"


@dataclass
class Recorded:
    """How one precision went. status: "recorded", or why PyTorch does not run it. leaves: what was to be seen, floating
    leaf modules that ran times the directions in which something passed; covered: those whose statistics are right.
    sites: recorded. identical: whether watching changed nothing."""

    status: str = RECORDED
    identical: bool = False
    covered: int = 0
    leaves: int = 0
    sites: int = 0

    @property
    def ran(self) -> bool:
        return self.status == RECORDED


@dataclass
class Result:
    """What was found of one architecture. plans: name -> "" where it applies, trains and comes off, else what is wrong
    or what PyTorch lacks for it. faults: sentences, none where all is well."""

    name: str
    package: str
    cls: str = ""
    modules: int = 0
    recorded: dict[str, Recorded] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(architecture: Architecture, folder: Path) -> Result:
    """All checks of one architecture; runs are recorded below `folder`."""
    start = time.perf_counter()
    result = Result(architecture.name, architecture.package)
    model = built(architecture)
    result.cls = type(model).__name__
    result.modules = sum(1 for _ in model.modules())
    for precision in PRECISIONS:
        result.recorded[precision] = _check_recording(architecture, precision, folder / precision, result)
    low = [p for p in ("bf16", "fp16") if result.recorded[p].ran]
    for name, plan in _plans(architecture, model, low, folder).items():
        fault = check_plan(architecture, plan)
        lacks = "cast" in name and "cast" in architecture.lacking
        if lacks and not fault.startswith("NotImplementedError"):
            fault = f"PyTorch was said to lack an operation for it: {fault or 'it runs'}"
            lacks = False
        result.plans[name] = fault
        result.faults += [f"{name} plan: {fault}"] * (bool(fault) and not lacks)
    result.seconds = time.perf_counter() - start
    return result


# Recording


def _check_recording(architecture: Architecture, precision: str, folder: Path, result: Result) -> Recorded:
    recorded = Recorded()
    try:
        plain = train(architecture, built(architecture), precision)
    except (RuntimeError, NotImplementedError) as error:
        recorded.status = first_line(error)
        if precision not in architecture.lacking:
            result.faults.append(f"{precision}: the unwatched run raised {recorded.status}")
        return recorded
    if precision in architecture.lacking:
        result.faults.append(f"{precision}: said not to run, and runs")
    if not plain.learnt:
        result.faults.append(f"{precision}: no step changed the weights")

    def watch(model: nn.Module, optimizer: Any, scaler: Any) -> AbstractContextManager:
        return ps.record(model, folder, optimizer=optimizer, scaler=scaler, every=1, on_error="raise")

    reference = Reference(referred := built(architecture))
    if fault := plain.differs(train(architecture, referred, precision, reference=reference)):
        result.faults.append(f"{precision}: two unwatched runs differ in {fault}")
    try:
        watched = train(architecture, built(architecture), precision, watch=watch)
    except Exception as error:
        recorded.status = f"{type(error).__name__}: {first_line(error)}"
        result.faults.append(f"{precision}: the watched run raised {recorded.status}")
        return recorded
    fault = plain.differs(watched)
    recorded.identical = not fault
    result.faults += [f"{precision}: watched and unwatched differ in {fault}"] * bool(fault)
    _check_coverage(reference, ps.Profile.load(folder), precision, recorded, result)
    return recorded


def _check_coverage(
    reference: Reference, profile: ps.Profile, precision: str, recorded: Recorded, result: Result
) -> None:
    """Every leaf module's outputs and the gradients that arrive there: as many elements, as large; every parameter."""
    if profile.steps != list(range(STEPS)):
        result.faults.append(f"{precision}: recorded steps {profile.steps}")
    sites, table = profile.merged("module")
    found = {(s.module, s.role): (int(table.count[i]), float(table.amax[i])) for i, s in enumerate(sites)}
    recorded.sites = len(profile.sites)
    wrong = []
    for role, expected in ((Role.OUTPUT, reference.forward), (Role.GRAD_OUTPUT, reference.backward)):
        for name, seen in expected.items():
            got = found.get((name, role), (0, 0.0))
            if got != (seen.elements, seen.amax):
                wrong.append(f"{name} {role.value} {got}, not {(seen.elements, seen.amax)}")
    recorded.leaves = len(reference.forward) + len(reference.backward)
    recorded.covered = recorded.leaves - len(wrong)
    result.faults += [f"{precision}: {len(wrong)} leaf modules lack statistics: {'; '.join(wrong[:3])}"] * bool(wrong)
    graded = {s.module + "." * bool(s.module) + s.tensor for s in profile.sites if s.role is Role.GRAD_WEIGHT}
    if missing := reference.parameters - graded:
        result.faults.append(f"{precision}: {len(missing)} parameters lack grad_weight: {sorted(missing)[:3]}")


# Plans


def _plans(architecture: Architecture, model: nn.Module, low: list[str], folder: Path) -> dict[str, ps.PrecisionPlan]:
    """Made by hand, module by module and block by block; and recommended from the recorded run, without a task."""
    run = folder / low[-1]
    return {
        "mixed": mixed_plan(model, low, architecture.whole),
        "recommended": ps.recommend(run, formats=(*low, "fp32")),
        "cast": cast_plan(model),
        "recommended cast": ps.recommend(run, formats=("bf16", "fp32"), policy="cast"),
    }


def mixed_plan(model: nn.Module, low: list[str], whole: tuple[str, ...] = ()) -> ps.PrecisionPlan:
    """Modules that own parameters in turn in fp32 and in each format of `low`; all else in the first of those. What
    lies in a module of a class in `whole` goes with it."""
    formats = ["fp32", *low]
    names: dict[str, None] = {}
    above = tuple(f"{name}." for name, m in model.named_modules() if type(m).__name__ in whole)
    for name, module in model.named_modules():
        if name and next(module.parameters(recurse=False), None) is not None:
            names[next((a[:-1] for a in above if name.startswith(a)), name)] = None
    layers = {name: ps.LayerPrecision(formats[i % len(formats)]) for i, name in enumerate(names)}
    return ps.PrecisionPlan(default=ps.LayerPrecision(low[0]), modules=layers)


def cast_plan(model: nn.Module) -> ps.PrecisionPlan:
    """All in bf16 without autocast, over fp32 parameters; every second block of a list of blocks is fp32."""
    islands = {
        f"{name}.{i}": ps.LayerPrecision("fp32")
        for name, modules in model.named_modules()
        if type(modules) is nn.ModuleList
        for i, block in enumerate(modules)
        if i % 2 == 0 and next(block.children(), None) is not None
    }
    return ps.PrecisionPlan(default=ps.LayerPrecision("bf16", policy="cast", params="fp32"), modules=islands)


def check_plan(architecture: Architecture, plan: ps.PrecisionPlan) -> str:
    """What is wrong with applying the plan, removing it, training a step with it; "" where nothing is."""
    model = built(architecture)
    keys, classes, forwards = _shape_of(model)
    start = copy.deepcopy(model.state_dict())
    plain = _loss(architecture, model)
    model.load_state_dict(start)  # running statistics moved
    try:
        with ps.apply(plan, model):
            _loss(architecture, model)
        model.load_state_dict(start)
        again = _loss(architecture, model)
        with ps.apply(plan, model):
            losses = _step(architecture, model)
    except Exception as error:
        applying.remove(model)
        return f"{type(error).__name__}: {first_line(error)}"
    if not equal(again, plain):
        return f"after removing it the loss is {again.item()!r}, not {plain.item()!r}"
    if not all(loss.isfinite() for loss in losses):
        return f"the loss before and after the step: {[loss.item() for loss in losses]}"
    if _shape_of(model) != (keys, classes, forwards):
        return "removing it does not restore the keys, the classes or the forwards"
    twin = built(architecture)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    left, right = _loss(architecture, model), _loss(architecture, twin)
    if not equal(left, right):
        return f"trained and removed, the loss is {left.item()!r}; with its weights in a new model {right.item()!r}"
    return ""


def _shape_of(model: nn.Module) -> tuple[list[str], list[type], list[bool]]:
    modules = list(model.modules())
    return list(model.state_dict()), [type(m) for m in modules], ["forward" in m.__dict__ for m in modules]


def _step(architecture: Architecture, model: nn.Module) -> list[Tensor]:
    """One step, the loss scaled; the losses before and after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    loss = _loss(architecture, model)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if wrong := [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]:
        raise ValueError(f"the gradients of {wrong[0]} and {len(wrong) - 1} more are not finite")
    scaler.step(optimizer)
    return [loss, _loss(architecture, model)]


def _loss(architecture: Architecture, model: nn.Module) -> Tensor:
    seed(2)
    return architecture.loss(model, architecture.batch(model, 0))
