"""Profile.ask and friends, and ps.profile on a small task."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch

import precscope as ps
from precscope.errors import FormatError, UsageError
from precscope.profiles import Profile, worst_first
from precscope.sites import Role

COLUMNS = [
    "module", "role", "call", "count", "amax", "amin_nonzero", "zeros", "nonfinite", "overflow_lo", "overflow_hi",
    "flushed", "subnormal", "sqnr_db", "loss_noise",
]  # fmt: skip


def task(**options):
    torch.manual_seed(0)
    return ps.Task(model=models.MLP(), loss=models.loss_of, batches=models.batch, **options)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Profile:
    return ps.profile(task(), out=tmp_path_factory.mktemp("p") / "run", steps=7, every=3, precision="fp16")


def test_profile_has_everything_a_recommendation_needs(profile):
    assert profile.steps == [0, 3, 6]
    assert {r.value for r in Role} == {s.role.value for s in profile.sites}
    assert set(profile.cost.format) == {"fp32", "bf16", "fp16"}
    flops = {m["name"]: m["flops"] for m in profile.graph["modules"]}
    assert flops["fc1"] == 2 * 6 * 8 * 16 and flops["fc2"] == 2 * 6 * 16 * 4 and flops["act"] == 0
    assert len(profile.train) == 7 and profile.run["precision"] == "fp16" and profile.run["status"] == "done"
    plan = ps.recommend(profile, costs="model")
    assert plan["fc1"].compute == "fp16"


def test_ask_columns_and_values(profile):
    table = profile.ask("e4m3")
    assert list(table.columns) == COLUMNS
    assert not table.duplicated(["module", "role", "call"]).any()
    assert ((table[["zeros", "overflow_lo", "overflow_hi", "flushed", "subnormal"]] >= 0).all()).all()
    assert (table.overflow_lo <= table.overflow_hi).all() and table.loss_noise.isna().all()
    assert profile.ask("e4m3", by="tensor")["count"].sum() == table["count"].sum()
    assert profile.ask("e4m3", by="module")["count"].sum() == table["count"].sum()


def test_ask_scale_moves_everything(profile):
    up = profile.ask("fp16", scale_exponent=40)
    assert (up.overflow_lo > 0).any() and (profile.ask("fp16", scale_exponent=-40).flushed > 0.5).any()
    assert np.array_equal(up.amax, profile.ask("fp16").amax)  # as recorded


def test_ask_roles_and_errors(profile):
    assert set(profile.ask("bf16", roles="weight").role) == {"weight"}
    assert set(profile.ask("bf16", roles=["input", "grad_output"]).role) == {"input", "grad_output"}
    with pytest.raises(UsageError, match="unknown role 'wieght'; roles are input"):
        profile.ask("bf16", roles=["wieght"])
    with pytest.raises(UsageError, match="by must be"):
        profile.ask("bf16", by="layer")
    with pytest.raises(FormatError, match="did you mean"):
        profile.ask("e4m33")


def test_worst_first(profile):
    table = profile.ask("e5m2")
    assert worst_first(table, "sqnr_db").sqnr_db.is_monotonic_increasing
    assert worst_first(table, "flushed").flushed.is_monotonic_decreasing
    with pytest.raises(UsageError, match="no column 'overflow'"):
        worst_first(table, "overflow")


def test_history_sums_to_the_table(profile):
    history = profile.history()
    assert set(history.step) == {0, 3, 6}
    total = history.groupby(["module", "role"], observed=True)["count"].sum()
    table = profile.ask("fp16", by="module").set_index(["module", "role"])["count"]
    assert all(total[m, r] == table[m, r] for m, r in table.index)


def test_profile_by_reference_and_overwrite(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch, precscope as ps\n"
        "def make():\n"
        "    m = torch.nn.Linear(4, 2)\n"
        "    return ps.Task(model=m, loss=lambda m, b: m(b).square().mean(), batches=[torch.ones(3, 4)])\n"
    )
    ref = f"{tmp_path / 'mine.py'}:make"
    one = ps.profile(ref, out=tmp_path / "run", steps=2, every=1, costs=False)
    assert one.cost is None and one.steps == [0, 1]
    with pytest.raises(UsageError, match="already holds a run"):
        ps.profile(ref, out=tmp_path / "run", steps=2)
    assert ps.profile(ref, out=tmp_path / "run", steps=1, exist="overwrite", costs=False).steps == [0]


def test_profile_text(profile):
    assert "4 modules" in str(profile) and "steps 0..6" in repr(profile)


def test_inference_is_recorded_without_gradients(tmp_path):
    mine = task(forward=lambda model, batch: model(batch[0]))
    mine.model.train()
    profile = ps.profile(mine, out=tmp_path / "run", steps=3, every=2, precision="bf16", train=False, costs=False)
    assert profile.steps == [0, 2] and mine.model.training and profile.run["mode"] == "inference"
    assert {s.role for s in profile.sites} == {Role.INPUT, Role.OUTPUT, Role.WEIGHT}
    assert all(p.grad is None for p in mine.model.parameters())
