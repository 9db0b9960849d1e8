"""Any loop in three lines: `ps.record`, `rec.step()` and `ps.apply` in the loops that people write.

Each loop of loops.py runs alone, watched, and watched with a plan; what it computes must be the same bits with and
without being watched, and what is recorded must be what passed.
"""

from __future__ import annotations

from collections import Counter

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import LOOPS, everything, gan_one_recorder, gan_two_recorders, net, several_optimizers, unwatched
from torch import nn

import precscope as ps
from precscope.errors import UsageError
from precscope.kernels import summarize
from precscope.sites import Role

PLANS = {
    "none": None,
    "plan": ps.PrecisionPlan(default="bf16", modules={"*.2": "fp32"}),
}


def into(out, every=1):
    """A factory of recorders; the second model of a loop goes to a directory of its own."""
    number = Counter()

    def watch(model, **options):
        number[out] += 1
        return ps.record(model, out / str(number[out]), every=every, **options)

    return watch


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", LOOPS)
def test_watching_changes_nothing(tmp_path, name, plan):
    alone = LOOPS[name](unwatched, PLANS[plan])
    seen = LOOPS[name](into(tmp_path), PLANS[plan])
    assert len(alone) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(alone, seen, strict=True))
    assert all(ps.Profile.load(path).steps for path in tmp_path.iterdir())


def test_a_plan_changes_what_is_computed_and_is_taken_off():
    for name, loop in LOOPS.items():
        without, planned = loop(unwatched, None), loop(unwatched, PLANS["plan"])
        assert not all(torch.equal(a, b) for a, b in zip(without, planned, strict=True)), name
        assert all(x.dtype is torch.float32 for x in planned[-6:]), name


def recorded(tmp_path, loop, **options):
    loop(into(tmp_path, **options), None)
    return ps.Profile.load(tmp_path / "1")


def merged(profile):
    """(module, role) -> statistics over all steps, calls and tensors."""
    sites, table = profile.merged(by="module")
    return {(s.module, s.role): table.row(i) for i, s in enumerate(sites)}


def alike(a, b):
    """Equal but for the order in which squares were added up."""
    return np.array_equal(a.counts, b.counts) and a.amax == b.amax and a.sumsq == pytest.approx(b.sumsq, rel=1e-12)


def test_everything_is_scaled_clipped_accumulated_and_evaluated(tmp_path):
    profile = recorded(tmp_path, everything)
    history = profile.history()
    outputs = history.query("module == '0.0' and role == 'output'")
    assert outputs["count"].tolist() == [2 * 6 * 16] * 6  # two micro-batches; the evaluation of 32 is left out
    assert set(history.query("role == 'output'").call) == {0}
    scales = history.query("module == '0.0' and role == 'grad_weight'").groupby("step").loss_scale.first()
    assert scales.nunique() > 1 and scales.diff().max() > 0  # the scaler backs off and grows
    gradients = merged(profile)["0.2.2", Role.GRAD_OUTPUT]
    assert gradients.amax < 1  # those of a mean, whatever the loss scale


def test_rows_of_a_closure_are_those_of_its_evaluations(tmp_path):
    """No gradient of an earlier step among them, and the update is that of the whole step."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    gradients, outputs = [], []
    before = []
    with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        for step in range(3):

            def closure(step=step):
                optimizer.zero_grad()
                out = model(models.batch(step)[0])
                loss = F.cross_entropy(out, models.batch(step)[1])
                loss.backward()
                outputs.append(out.detach())
                gradients.append(model[0].weight.grad.clone())
                return loss

            before.append(model[0].weight.detach().clone())
            optimizer.step(closure)
            rec.step()
    after = [*before[1:], model[0].weight.detach()]
    assert len(outputs) > 6
    profile = ps.Profile.load(tmp_path / "run")
    table = {(s.module, s.role, s.tensor): profile.table.row(i) for i, s in enumerate(profile.sites)}
    assert alike(table["0", Role.GRAD_WEIGHT, "weight"], summarize(torch.cat(gradients)))
    assert alike(table["", Role.OUTPUT, ""], summarize(torch.cat(outputs)))
    updates = torch.cat([b - a for a, b in zip(before, after, strict=True)])
    assert alike(table["0", Role.UPDATE, "weight"], summarize(updates))
    assert profile.run["optimizers"][0]["class"] == "LBFGS"


def test_a_closure_and_gradients_that_no_hook_sees(tmp_path):
    """What a closure writes into .grad itself is taken after the step."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        for step in range(2):

            def closure(step=step):
                model(torch.ones(1, 4))
                for p in model.parameters():
                    p.grad = torch.full_like(p, step + 1.0)

            optimizer.step(closure)
            rec.step()
    history = ps.Profile.load(tmp_path / "run").history()
    rows = history.query("role == 'grad_weight' and tensor == 'weight'")
    assert rows["count"].tolist() == [8, 8] and rows.amax.tolist() == [1.0, 2.0]


def test_several_optimizers_are_all_described_and_watched(tmp_path):
    profile = recorded(tmp_path, several_optimizers)
    assert [o["class"] for o in profile.run["optimizers"]] == ["AdamW", "SGD"]
    rows = merged(profile)
    for name in ("0", "2.0", "2.2"):
        assert (name, Role.UPDATE) in rows
    states = {s.tensor for s in profile.sites if s.role is Role.STATE and s.call == 0}
    assert states == {"weight.exp_avg", "weight.exp_avg_sq", "bias.exp_avg", "bias.exp_avg_sq"}  # plain SGD has none


def test_one_recorder_over_a_container_sees_what_two_see(tmp_path):
    """Parameters that are frozen in turns included: every gradient, however the round begins."""
    gan_one_recorder(into(tmp_path / "one"), None)
    gan_two_recorders(into(tmp_path / "two"), None)
    one = merged(ps.Profile.load(tmp_path / "one" / "1"))
    for name, number in (("g", 1), ("d", 2)):
        own = merged(ps.Profile.load(tmp_path / "two" / str(number)))
        assert own
        for (module, role), stats in own.items():
            if module:  # a Sequential that is not the root is its parts
                assert alike(one[f"{name}.{module}", role], stats), (name, module, role)
    rounds = 3
    assert one["d.0", Role.GRAD_WEIGHT].count == rounds * (16 * 8 + 16)
    assert one["d.0", Role.OUTPUT].count == rounds * 3 * 6 * 16  # real, fake, and fake once more for the generator


def test_calls_of_parts_are_counted_per_pass(tmp_path):
    """Where the container itself is never called: per backward pass, not over the micro-batches of a step."""
    both = nn.ModuleDict({"a": net(8, 8), "b": net(8, 4)})
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with ps.record(both, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        for step in range(2):
            for micro in range(3):
                x, y = models.batch(3 * step + micro)
                F.cross_entropy(both["b"](both["a"](both["a"](x))), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
    profile = ps.Profile.load(tmp_path / "run")
    calls = {
        name: {s.call for s in profile.sites if (s.module, s.role) == (name, Role.OUTPUT)} for name in ("a.0", "b.0")
    }
    assert calls == {"a.0": {0, 1}, "b.0": {0}}
    told = {m["name"]: m for m in profile.graph["modules"]}
    assert told["a.0"]["calls"] == 2 and told["b.0"]["calls"] == 1
    assert told["b.0"]["flops"] == 2 * 6 * 16 * 8
    assert {(e["producer"], e["consumer"]) for e in profile.graph["edges"]} >= {("a.2.2", "b.0"), ("a.2.2", "a.0")}


def test_both_backward_passes_through_one_graph_count(tmp_path):
    model = net()
    x, y = models.batch(0)
    with ps.record(model, tmp_path / "run", every=1) as rec:
        out = model(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        out.square().mean().backward()
        rec.step()
    kept = model(x)
    both = [
        torch.autograd.grad(loss, kept, retain_graph=True)[0]
        for loss in (F.cross_entropy(kept, y), kept.square().mean())
    ]
    rows = merged(ps.Profile.load(tmp_path / "run"))
    assert alike(rows["2.2", Role.GRAD_OUTPUT], summarize(torch.cat(both)))
    assert rows["2.2", Role.OUTPUT].count == out.numel()


def test_evaluations_are_left_out_and_inference_is_not(tmp_path):
    model, x = net(), models.batch(0)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    for name, given in (("training", optimizer), ("inference", None)):
        with ps.record(model, tmp_path / name, optimizer=given, every=1) as rec:
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            model(x).sum().backward()  # fine-tuning in eval mode is training
            rec.step()
    for name, passes in (("training", 1), ("inference", 3)):
        assert merged(ps.Profile.load(tmp_path / name))["0", Role.OUTPUT].count == passes * 6 * 16


def test_a_teacher_without_gradients_is_part_of_the_training(tmp_path):
    both = nn.ModuleDict({"student": net(), "teacher": net(seed=1)})
    both["teacher"].eval().requires_grad_(False)
    optimizer = torch.optim.SGD(both["student"].parameters(), lr=0.1)
    with ps.record(both, tmp_path / "run", optimizer=optimizer, every=1) as rec:
        x = models.batch(0)[0]
        with torch.no_grad():
            target = both["teacher"](x)
        F.mse_loss(both["student"](x), target).backward()
        optimizer.step()
        rec.step()
    rows = merged(ps.Profile.load(tmp_path / "run"))
    assert rows["teacher.0", Role.OUTPUT].count == 6 * 16
    assert ("teacher.0", Role.GRAD_WEIGHT) not in rows


def test_what_is_given_for_optimizer_and_scaler_is_checked(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twice = ps.record(model, tmp_path / "a", optimizer=[optimizer, optimizer], every=1)
    with twice as rec:
        models.loss_of(model, models.batch(0)).backward()
        optimizer.step()
        rec.step()
    assert len(ps.Profile.load(tmp_path / "a").run["optimizers"]) == 1
    with pytest.raises(UsageError, match=r"optimizer=\[a, b\], not Linear"):
        ps.record(model, tmp_path / "b", optimizer=[optimizer, nn.Linear(1, 1)])
    with pytest.raises(UsageError, match="several, optimizer=.*not float"):
        ps.record(model, tmp_path / "b", optimizer=0.1)
    scalers = [torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")]
    with pytest.raises(UsageError, match="scaler must be a torch.amp.GradScaler or a number, not list.*by itself"):
        ps.record(model, tmp_path / "b", optimizer=optimizer, scaler=scalers)
