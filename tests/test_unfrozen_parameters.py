"""Parameters that are frozen when a step begins and trained within it, as the other model of adversarial loops is."""

from __future__ import annotations

import copy

import torch
from torch import nn

import precscope as ps
from precscope.sites import Role

PASSES = 70


def test_additions_to_gradients_are_counted_once_a_parameter_is_unfrozen(tmp_path):
    """Two models in turns, 70 passes each a step, the second frozen while the first is trained and at the step's end:
    the row of the 64th addition is there for both, and for nothing that stays frozen."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "never")})
    model["never"].requires_grad_(False)
    model["second"].requires_grad_(False)
    optimizers = [torch.optim.SGD(model[name].parameters(), lr=0.01) for name in ("first", "second")]
    with ps.record(model, tmp_path / "run", optimizer=optimizers, every=1) as rec:
        for _ in range(2):
            for name, optimizer in zip(("first", "second"), optimizers, strict=True):
                model[name].requires_grad_(True)
                for _ in range(PASSES):
                    model["never"](model[name](torch.ones(2, 4))).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                model[name].requires_grad_(False)
            copied = copy.deepcopy(model)
            copied["second"](torch.ones(2, 4))
            rec.step()
    profile = ps.Profile.load(tmp_path / "run")
    sums = {(s.module, s.tensor) for s in profile.sites if s.role is Role.STATE and s.tensor.endswith(".grad")}
    assert sums == {(name, f"{tensor}.grad") for name in ("first", "second") for tensor in ("weight", "bias")}
    history = profile.history().query("role == 'state' and module == 'second' and tensor == 'weight.grad'")
    assert history.step.tolist() == [0, 1]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
