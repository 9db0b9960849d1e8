"""Costs and FLOPs of every module: what runs in place, what fails alone, wrapped, shared, left by an error."""

from __future__ import annotations

import random

import models
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from precscope.advice.cost import CostTable
from precscope.advice.measurement import measure
from precscope.advice.units import ModelGraph, Unit
from precscope.applying.scaled import native_anywhere
from precscope.preservation import preserved
from precscope.recording.flops import count_flops

FORMATS = ("fp32", "bf16", "fp16")
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def formats_of(table: pd.DataFrame, module: str) -> list[str]:
    return sorted(table[table.module == module].format)


def test_modules_that_work_in_place_are_timed():
    notes = []
    table = measure(models.InPlace(), lambda: None, FORMATS)
    assert table.empty
    model = models.InPlace()
    table = measure(model, lambda: model(X), FORMATS, note=notes.append)
    assert formats_of(table, "act") == sorted(FORMATS) and formats_of(table, "") == sorted(FORMATS)
    assert not notes


def test_e4m3_is_timed_where_the_device_multiplies_it_and_leaves_no_plan_behind():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU()), torch.ones(8, 16)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    asked = ("fp32", "bf16", "e4m3")
    assert formats_of(measure(model, lambda: model(x), asked), "0") == ["bf16", "fp32"]
    with native_anywhere():
        table = measure(model, lambda: model(x), asked)
    assert formats_of(table, "0") == formats_of(table, "1") == sorted(asked)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())


def test_what_is_timed_does_not_see_its_own_changes():
    """Masks and indices too are handed over as copies."""

    class Flips(nn.Module):
        def forward(self, x, mask):
            seen.append(bool(mask[0]))
            return x * mask.logical_not_()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flips = Flips()

        def forward(self, x):
            return self.flips(x, torch.ones(6, 1, dtype=torch.bool)).sum()

    seen, model = [], Model()
    measure(model.flips, lambda: model.flips(X, torch.zeros(6, 1, dtype=torch.bool)), ("fp32",))
    assert len(seen) > 3 and len(set(seen[1:])) == 1


class Fails(nn.Module):
    """Refuses one dtype of its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.fc = dtype, nn.Linear(8, 8)

    def forward(self, x):
        if x.dtype is self.dtype:
            raise RuntimeError(f"no kernel for {x.dtype}\nsecond line")
        return self.fc(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_that_fails_in_one_format_is_modelled_in_all(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.bad = nn.Linear(8, 8), Fails(dtype)

        def forward(self, x):
            return self.bad(self.fine(x).float())

    model, notes = Model(), []
    table = measure(model, lambda: model(X), FORMATS, note=notes.append)
    assert formats_of(table, "fine") == sorted(FORMATS) and formats_of(table, "bad") == []
    word = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert notes == [
        f"bad (Fails) does not run alone in {word} (RuntimeError: no kernel for {dtype}): "
        "its cost is modelled, not measured"
    ]
    graph = ModelGraph((Unit("fine", "Linear", flops=768), Unit("bad", "Fails", flops=768)), ())
    costs = CostTable.of(table, graph, FORMATS)
    assert {costs.how["bad", f] for f in FORMATS} == {"model"}
    assert {costs.how["fine", f] for f in FORMATS} == {"measured"}


def test_the_whole_model_is_timed_after_its_parts():
    model, order = models.MLP(), []
    measure(model, lambda: model(X), ("fp32",), progress=order.append)
    assert order[-1] == "" and set(order) == {"", "fc1", "act", "fc2"}


def linear(rows: int, n: int, m: int) -> int:
    return 2 * rows * n * m


MLP = {"": 0, "fc1": linear(6, 8, 16), "act": 0, "fc2": linear(6, 16, 4)}


def test_flops_of_a_compiled_model():
    torch.compiler.reset()
    model = models.MLP()
    compiled = torch.compile(model, backend="eager")
    compiled(X)  # compiled code runs no hooks
    assert count_flops(model, lambda: compiled(X)) == MLP
    assert count_flops(compiled, lambda: compiled(X)) == MLP
    assert formats_of(measure(model, lambda: compiled(X), FORMATS), "fc1") == sorted(FORMATS)
    with torch.compiler.set_stance("force_eager"):
        count_flops(model, lambda: compiled(X))
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_flops_of_a_wrapped_model():
    model = models.MLP()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x)

    wrapper = Wrapper()
    assert count_flops(model, lambda: wrapper(X)) == MLP
    parallel = nn.DataParallel(model) if not torch.cuda.is_available() else wrapper.module
    assert count_flops(parallel, lambda: parallel(X)) == MLP


def test_flops_of_a_shared_module_are_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(8, 8)
            self.one, self.two = nn.Sequential(shared), nn.Sequential(shared, nn.Linear(8, 4))

        def forward(self, x):
            return self.two(self.one(x)) @ torch.ones(4, 2)

    model = Model()
    flops = count_flops(model, lambda: model(X))
    assert flops == {"": linear(6, 4, 2), "one.0": 2 * linear(6, 8, 8), "two.1": linear(6, 8, 4)}
    thrice = models.SharedTwice()
    assert count_flops(thrice, lambda: thrice(X))["layer"] == 3 * linear(6, 8, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_flops_of_a_gradient_penalty(reentrant):
    """A gradient taken inside the loss is nobody's forward pass, nor is what checkpointing repeats for it."""
    model = models.Checkpointed(reentrant=reentrant)

    def loss():
        x = X.clone().requires_grad_()
        y = model(x).square().sum()
        if reentrant:  # which refuses autograd.grad
            y.backward()
            return y
        return y + torch.autograd.grad(y, x, create_graph=True)[0].square().sum()

    flops = count_flops(model, loss)
    assert flops["body.fc1"] == linear(6, 8, 16) and flops["stem"] == linear(6, 8, 8)
    assert all(p.grad is None for p in model.parameters())
    with preserved(model):
        assert formats_of(measure(model, loss, ("fp32", "bf16")), "body.fc1") == ["bf16", "fp32"]


def test_an_error_leaves_no_hook_and_passes_through():
    model = nn.Sequential(nn.Linear(8, 8), Fails(torch.float32))
    with pytest.raises(RuntimeError, match="no kernel"):
        count_flops(model, lambda: model(X))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_that_the_model_catches_disturbs_no_count():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = Fails(torch.float32), nn.Linear(8, 4)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x)

    model = Tries()
    assert count_flops(model, lambda: model(X)) == {"": 0, "bad": 0, "bad.fc": 0, "good": linear(6, 8, 4)}


class Drifting(nn.Module):
    """Re-assigns one buffer, changes another in place, makes a third, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(8))
        self.register_buffer("cache", None)

    def forward(self, x):
        self.count = self.count + 1
        self.total += x.detach().sum(0)
        self.cache = x.detach()
        return x * random.random() * float(np.random.rand()) * torch.rand(())


def test_preserved_buffers_and_generators():
    model = Drifting()
    count, total = model.count, model.total
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with pytest.raises(KeyError), preserved(model):
        model(X)
        assert model.count == 1
        raise KeyError
    assert model.count is count and model.count == 0 and model.cache is None
    assert model.total is total and not total.any()
    assert states[0] == random.getstate() and np.array_equal(states[1], np.random.get_state()[1])
    assert torch.equal(states[2], torch.get_rng_state())
