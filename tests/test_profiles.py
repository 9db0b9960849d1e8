"""Profile.ask and friends, and ps.profile on a small task."""

from __future__ import annotations

import random

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
    assert (table.overflow_lo <= table.overflow_hi).all()
    priced = set(table.role[table.loss_noise.notna()])
    assert priced == {"input", "output", "weight"} and (table.loss_noise.dropna() > 0).all()  # by shadow steps
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


def test_inference_settings(tmp_path):
    with pytest.raises(UsageError, match=r"profile\(train=False\) has no setting 'lr'.*only seed and progress apply"):
        ps.profile(task(), out=tmp_path / "run", steps=1, train=False, lr=1e-3)
    assert not (tmp_path / "run").exists()
    seen = []
    made = [
        ps.profile(noisy_task(draws=True), out=tmp_path / f"run{i}", steps=2, every=1, train=False, seed=seed,
                   costs=False, progress=lambda done, total, loss: seen.append(done))
        for i, seed in enumerate((3, 3, 4))
    ]  # fmt: skip
    amax = [p.ask("fp32", roles="output").amax.tolist() for p in made]
    assert amax[0] == amax[1] != amax[2] and seen[:2] == [1, 2]


class Noisy(models.MLP):
    """Draws from Python's, numpy's and torch's generators in every pass, and counts them in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes = self.passes + 1
        return super().forward(x * (1 + random.random() + float(np.random.rand()) + torch.rand(()) + self.passes / 10))


def noisy_task(*, draws=False):
    torch.manual_seed(0)

    def drawn(step):
        return torch.randn(6, 8), torch.randint(0, 4, (6,))

    loss = models.loss_of
    forward = (lambda model, batch: model(batch[0])) if draws else None
    return ps.Task(model=Noisy(), loss=loss, batches=drawn if draws else models.batch, forward=forward)


@pytest.mark.parametrize("draws", [False, True])
def test_profiling_does_not_change_the_run(tmp_path, draws):
    plain = ps.train(noisy_task(draws=draws), steps=4, precision="bf16")
    mine = noisy_task(draws=draws)
    random.seed(5)
    profile = ps.profile(mine, out=tmp_path / "run", steps=4, every=2)
    assert tuple(profile.train.loss) == plain.losses
    assert mine.model.passes == 4 and profile.cost is not None


def generator():
    for step in range(6):
        yield models.batch(step)


@pytest.mark.parametrize("kind", ["generator", "function"])
def test_batches_that_cannot_be_read_again(tmp_path, kind):
    torch.manual_seed(0)
    source = generator()
    batches = source if kind == "generator" else lambda step: next(source)
    mine = ps.Task(model=models.MLP(), loss=models.loss_of, batches=batches)
    profile = ps.profile(mine, out=tmp_path / "run", steps=6, every=3)
    assert profile.cost is not None and len(profile.train) == 6
    assert {m["name"]: m["flops"] for m in profile.graph["modules"]}["fc1"] == 2 * 6 * 8 * 16
    assert tuple(profile.train.loss) == ps.train(task(), steps=6, precision="bf16").losses
    assert "batch" not in vars(mine)


def test_a_loss_that_takes_its_labels_out_of_the_batch(tmp_path):
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch.pop("y"))

    torch.manual_seed(0)
    mine = ps.Task(model=models.MLP(), loss=loss, batches=lambda step: dict(zip("xy", models.batch(step), strict=True)))
    profile = ps.profile(mine, out=tmp_path / "run", steps=2, every=1)
    assert profile.cost is not None and any(m["flops"] for m in profile.graph["modules"])


def test_a_loss_with_a_gradient_inside(tmp_path):
    def loss(model, batch):
        x = batch[0].clone().requires_grad_()
        out = model(x).square().mean()
        return out + torch.autograd.grad(out, x, create_graph=True)[0].square().sum()

    torch.manual_seed(0)
    mine = ps.Task(model=models.MLP(), loss=loss, batches=models.batch)
    profile = ps.profile(mine, out=tmp_path / "run", steps=2, every=1)
    flops = {m["name"]: m["flops"] for m in profile.graph["modules"]}
    assert flops["fc1"] == 2 * 6 * 8 * 16 and profile.cost is not None


def test_a_profile_without_flops_and_costs_is_still_a_profile(tmp_path):
    """The loss works in training, and fails when it is called once more."""

    def make():
        calls = []

        def loss(model, batch):
            calls.append(0)
            if len(calls) > 2:
                raise RuntimeError("only twice")
            return models.loss_of(model, batch)

        torch.manual_seed(0)
        return ps.Task(model=models.MLP(), loss=loss, batches=models.batch)

    notes = []
    profile = ps.profile(make(), out=tmp_path / "run", steps=2, every=1, shadow_every=None, note=notes.append)
    assert profile.cost is None and profile.steps == [0, 1] and profile.run["status"] == "done"
    assert [n for n in notes if "RuntimeError: only twice" in n] == [
        "FLOPs could not be counted (RuntimeError: only twice): advice goes by measured costs alone",
        "costs could not be measured (RuntimeError: only twice): advice goes by a model of them",
    ]
    with pytest.warns(RuntimeWarning, match="FLOPs could not be counted"):
        ps.profile(make(), out=tmp_path / "again", steps=2, every=1, shadow_every=None, costs=False)


def test_a_failed_run_keeps_its_flops_and_its_error(tmp_path):
    def batches(step):
        if step == 2:
            raise OSError("disk gone")
        return models.batch(step)

    torch.manual_seed(0)
    mine = ps.Task(model=models.MLP(), loss=models.loss_of, batches=batches)
    with pytest.raises(OSError, match="disk gone"):
        ps.profile(mine, out=tmp_path / "run", steps=4, every=1)
    profile = Profile.load(tmp_path / "run")
    assert profile.steps == [0, 1] and profile.run["status"] == "failed"
    assert any(m["flops"] for m in profile.graph["modules"]) and "batch" not in vars(mine)
