"""The training loop: its numbers, its settings, what it does when a run goes bad, and its files."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precscope.errors import PlanError, RunDirectoryError, TaskError, TrainingError, UsageError
from precscope.plans import PrecisionPlan
from precscope.tasks import Task, make_task
from precscope.training import TrainConfig, train
from precscope.training.devices import to_device
from precscope.training.halfmatmul import half_matmul_through_fp32, needs_half_matmul
from precscope.training.log import read_log
from precscope.training.precision import LossScaler
from precscope.training.tasks.gpt import gpt

tiny = partial(make_task, partial(gpt, "tiny"))
PRECISIONS = ("fp32", "bf16", "fp16")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu(self.inner(x))))


def regression(**changes) -> Task:
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    batches = [(x[i : i + 8], x[i : i + 8].sum(1, keepdim=True)) for i in range(0, 40, 8)]
    parts = {
        "model": Regression(),
        "loss": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "batches": batches,
        "eval_batches": batches[:2],
        **changes,
    }
    return Task(**parts)


def parameters(task: Task) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()


# the numbers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_run_bit_for_bit(precision):
    runs = []
    for _ in range(2):
        task = regression()
        result = train(task, steps=12, precision=precision, seed=3)
        runs.append((result.losses, result.eval_loss, parameters(task)))
    assert runs[0][:2] == runs[1][:2]
    assert torch.equal(runs[0][2], runs[1][2])
    other = train(regression(), steps=12, precision=precision, seed=4)
    assert other.losses != runs[0][0], "dropout follows the seed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_to_the_loop_a_user_would_write(precision):
    """Autocast, GradScaler, accumulation, unscaling before clipping, AdamW and the schedule in plain PyTorch."""
    settings = {"steps": 8, "accumulate": 2, "lr": 3e-3, "grad_clip": 0.05, "warmup": 3, "weight_decay": 0.1}
    task = tiny()
    result = train(task, precision=precision, seed=0, **settings)

    twin, config = tiny(), TrainConfig(**settings)
    matrices = [p for p in twin.model.parameters() if p.dim() >= 2]
    vectors = [p for p in twin.model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    losses = []
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * config.lr_factor(step)
        total = 0.0
        for index in (2 * step, 2 * step + 1):
            with half_matmul_through_fp32() if needs_half_matmul() else _nothing():
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = twin.loss(twin.model, twin.batch(index))
                scaler.scale(loss / 2).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(matrices + vectors, 0.05)
        assert norm > 0.05, "clipping must bite for this test to tell unscaled gradients from scaled ones"
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(total / 2))
    assert result.losses == tuple(losses)
    assert torch.equal(parameters(task), parameters(twin))


@contextmanager
def _nothing():
    yield


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns(precision):
    result = train(tiny(), steps=40, lr=1e-2, warmup=4, precision=precision)
    assert result.losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert result.train_loss < 4.2 and result.eval_loss < 4.3
    assert result.nonfinite_steps == 0 and result.precision == precision and result.steps == 40
    assert (result.scale_history == ()) == (precision != "fp16")


def test_accumulated_micro_batches_are_one_large_batch():
    x = torch.randn(16, 8)
    whole = [(x, x.sum(1, keepdim=True))]
    halves = [(x[:8], x[:8].sum(1, keepdim=True)), (x[8:], x[8:].sum(1, keepdim=True))]
    results = []
    for batches, count in ((whole, 1), (halves, 2)):
        task = regression(batches=batches)
        task.model.drop.p = 0.0
        results.append((train(task, steps=5, accumulate=count).losses, parameters(task)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_evaluation_does_not_touch_training():
    plain, often = regression(), regression()
    quiet = train(plain, steps=10)
    result = train(often, steps=10, eval_every=3)
    assert result.losses == quiet.losses and torch.equal(parameters(plain), parameters(often))
    assert [step for step, _ in result.evaluations] == [3, 6, 9, 10]
    assert result.evaluations[-1][1] == result.eval_loss == quiet.eval_loss
    plain.model.eval()
    with torch.no_grad():
        expected = sum(float(plain.loss(plain.model, b)) for b in plain.eval_batches) / 2
    assert result.eval_loss == pytest.approx(expected, rel=1e-6)


def test_an_empty_evaluation_is_explained():
    with pytest.raises(TaskError, match="eval_batches is empty: give at least one held-out batch"):
        train(regression(eval_batches=iter(())), steps=2)


# plans


@pytest.mark.parametrize("compute", PRECISIONS)
def test_a_uniform_plan_trains_as_plain_autocast(compute):
    task, twin = tiny(), tiny()
    planned = train(task, steps=6, plan=PrecisionPlan.uniform(compute))
    plain = train(twin, steps=6, precision=compute)
    assert planned.precision == "plan"
    assert planned.losses == pytest.approx(plain.losses, rel=1e-6)
    assert (planned.scale_history == ()) == (compute != "fp16")


def test_a_plan_with_one_fp16_module_has_a_loss_scale_and_is_taken_off_afterwards(tmp_path):
    plan = PrecisionPlan(
        default="fp32", modules={"blocks.0.mlp": "fp16", "head": "bf16"}, loss_scale={"initial": 256.0}
    )
    path, task = plan.save(tmp_path / "plan.json"), tiny()
    result = train(task, steps=4, plan=str(path), out=tmp_path / "run")
    assert result.scale_history == ((0, 256.0),)
    assert result.plan == plan and PrecisionPlan.load(tmp_path / "run" / "plan.json") == plan
    assert all("forward" not in module.__dict__ for module in task.model.modules())
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}


def test_a_plan_comes_off_when_training_fails():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    task = regression(loss=loss)
    with pytest.raises(ZeroDivisionError):
        train(task, steps=2, plan=PrecisionPlan.uniform("bf16"))
    assert all("forward" not in module.__dict__ for module in task.model.modules())


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(PlanError, match="no module 'headd'"):
        train(tiny(), steps=2, plan=PrecisionPlan(modules={"headd": "fp32"}))


def test_parameters_stored_low_train_with_state_of_their_type():
    plan = PrecisionPlan.uniform("bf16", policy="cast")
    task, seen = regression(), []
    task.after_step = lambda model, step: seen.append({p.dtype for p in model.parameters()})
    result = train(task, steps=4, plan=plan)
    assert seen == [{torch.bfloat16}] * 4
    assert result.nonfinite_steps == 0 and {p.dtype for p in task.model.parameters()} == {torch.float32}


# steps that are not finite


def with_bad_batches(*bad: int, value: float = float("nan"), precision_task=regression) -> Task:
    good = precision_task().batches
    return regression(batches=lambda s: (good[s % 5][0] * value, good[s % 5][1]) if s in bad else good[s % 5])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_nan_is_counted_and_leaves_the_weights_alone(precision):
    weights = []
    task = with_bad_batches(3)
    task.after_step = lambda model, step: weights.append(parameters(task))
    result = train(task, steps=8, precision=precision, initial_scale=256.0)
    assert math.isnan(result.losses[3]) and sum(map(math.isnan, result.losses)) == 1
    assert result.nonfinite_steps == result.skipped_steps == 1
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])
    assert torch.isfinite(weights[-1]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_three_bad_steps_in_a_row_end_the_run_with_everything_on_disk(precision, tmp_path):
    task = with_bad_batches(2, 4, 5, 6, 7)
    with pytest.raises(TrainingError) as caught:
        train(task, steps=20, precision=precision, out=tmp_path / "run")
    message = str(caught.value)
    assert "the loss was not finite at 3 consecutive steps (4 to 6)" in message
    assert "the batch itself holds NaN or inf (100% of tensor 0); look at the data" in message
    assert "\n" not in message and caught.value.exit_code == 1
    log = pd.read_parquet(tmp_path / "run" / "train.parquet")
    assert log.step.tolist() == list(range(7)) and log.nonfinite.tolist() == [False, False, True, False] + [True] * 3
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and "3 consecutive steps" in run["error"]
    assert torch.isfinite(parameters(task)).all()


def test_a_bad_micro_batch_is_found_among_the_good():
    task = with_bad_batches(4, 6, 8)
    with pytest.raises(
        TrainingError, match=r"steps \(2 to 4\) .* the batch itself holds NaN or inf \(100% of tensor 0.0\)"
    ):
        train(task, steps=8, accumulate=2)
    bad = regression(batches=((x * float("nan"), y) for x, y in regression().batches))
    with pytest.raises(TrainingError, match=r"consecutive steps \(0 to 2\)"):
        train(bad, steps=8, sync_every=5)


def test_the_limit_of_bad_steps_is_a_setting():
    with pytest.raises(TrainingError, match=r"not finite at step 2 in fp32"):
        train(with_bad_batches(2), steps=5, nonfinite_limit=1)
    assert train(with_bad_batches(2, 3, 4, 5), steps=8, nonfinite_limit=5).nonfinite_steps == 4


def test_a_non_finite_gradient_of_a_finite_loss_is_a_bad_step_without_a_loss_scale():
    task = regression(loss=lambda model, batch: (0 * model(batch[0])).sqrt().mean())  # d sqrt(0) = inf, times 0
    before = parameters(task)
    with pytest.raises(
        TrainingError, match=r"the gradient was not finite at 3 .*batch, parameters and buffers are finite"
    ):
        train(task, steps=5, precision="bf16")
    assert torch.equal(parameters(task), before)


def test_a_poisoned_parameter_is_named():
    task = regression()
    with torch.no_grad():
        task.model.head.bias.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"parameter head.bias holds NaN or inf \(100%\)"):
        train(task, steps=5)


def test_a_loss_scale_too_high_skips_and_comes_down_and_is_no_failure():
    weights = []
    task = regression()
    task.after_step = lambda model, step: weights.append(parameters(task))
    result = train(task, steps=14, precision="fp16", initial_scale=2.0**21)
    skipped = result.skipped_steps
    assert 2 <= skipped <= 12 and result.nonfinite_steps == 0
    assert result.scale_history[: skipped + 1] == tuple((i, 2.0 ** (21 - i)) for i in range(skipped + 1))
    assert all(torch.equal(w, weights[0]) for w in weights[:skipped]) and not torch.equal(weights[-1], weights[0])


def test_a_loss_scale_that_falls_for_ever_ends_the_run():
    task = regression(loss=lambda model, batch: (0 * model(batch[0])).sqrt().mean())
    with pytest.raises(TrainingError, match=r"the loss scale fell to 0.000488281 at step 27 .* precision='bf16'"):
        train(task, steps=40, precision="fp16")


def test_a_scale_that_must_goes_below_the_floor_of_the_plan():
    """The floor says where gradients begin to be lost; skipping every step would lose all of them."""
    plan = PrecisionPlan(default="fp16", loss_scale={"initial": 4096.0, "floor": 1024.0, "growth_interval": 7})
    bad = regression(loss=lambda model, batch: (0 * model(batch[0])).sqrt().mean())
    assert train(bad, steps=5, plan=plan).scale_history == tuple((step, 2.0 ** (12 - step)) for step in range(5))
    scaler = LossScaler.of(plan, "cpu", initial=32.0)
    scaler.scale(torch.ones(()))
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (32.0, 7)


# optimizers and the schedule


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.01),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        lambda params: torch.optim.SGD(params, lr=0.01),
    ],
    ids=["class", "partial", "of model", "of params"],
)
def test_a_task_may_bring_its_optimizer(optimizer):
    task = regression(optimizer=optimizer)
    before = parameters(task)
    train(task, steps=3, schedule="none")
    assert not torch.equal(parameters(task), before)


def test_schedule_none_leaves_the_rate_of_an_optimizer_alone():
    task = regression()
    task.optimizer = torch.optim.SGD(task.model.parameters(), lr=0.125)
    rates = []
    task.after_step = lambda model, step: rates.append(task.optimizer.param_groups[0]["lr"])
    train(task, steps=3, schedule="none")
    assert rates == [0.125] * 3
    train(task, steps=20, schedule="linear", warmup=1, min_lr=0.0)
    assert rates[3] == 0.0625 and rates[4] == 0.125 and rates[-1] == pytest.approx(0.125 / 19)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda model: 3, "must return a torch.optim.Optimizer, not int 3"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS needs a closure"),
    ],
)
def test_an_optimizer_of_the_wrong_kind_is_refused(optimizer, message):
    with pytest.raises(TaskError, match=message):
        train(regression(optimizer=optimizer), steps=1)


def test_nothing_to_train_is_refused():
    task = regression()
    task.model.requires_grad_(False)
    with pytest.raises(TaskError, match="Regression has no trainable parameter"):
        train(task, steps=1)
    with pytest.raises(TaskError, match="has no trainable parameter"):
        train(regression(model=nn.ReLU()), steps=1)


def test_sparse_gradients_train():
    model = nn.EmbeddingBag(10, 4, sparse=True)
    task = regression(
        model=model,
        loss=lambda m, b: m(b).square().mean(),
        batches=[torch.tensor([[1, 2], [2, 3]])],
        eval_batches=None,
        optimizer=torch.optim.SGD,
    )
    before = model.weight.detach().clone()
    result = train(task, steps=2, lr=0.1)
    assert result.eval_loss is None and result.losses[1] < result.losses[0]
    changed = (model.weight != before).any(1)
    assert changed.tolist() == [False, True, True, True] + [False] * 6


def test_a_model_with_frozen_and_unused_parameters_trains():
    task = regression()
    task.model.inner.requires_grad_(False)
    task.model.unused = nn.Linear(2, 2)
    assert train(task, steps=3, precision="fp16").nonfinite_steps == 0


def test_a_loss_that_misses_the_optimizer_is_explained():
    other = nn.Linear(8, 1)
    task = regression(loss=lambda model, batch: other(batch[0]).mean())
    with pytest.raises(
        TaskError, match="no parameter got a gradient: does the loss depend on what the optimizer holds"
    ):
        train(task, steps=1)


def test_the_schedule_is_a_plain_function():
    config = TrainConfig(steps=100, warmup=9)
    assert [config.lr_factor(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert config.lr_factor(100) == pytest.approx(0.1) and config.lr_factor(9 + 91 // 2) == pytest.approx(
        0.55, abs=0.01
    )
    factors = [config.lr_factor(s) for s in range(9, 100)]
    assert factors == sorted(factors, reverse=True)
    assert TrainConfig(steps=100, warmup=0, schedule="linear").lr_factor(50) == pytest.approx(0.55)
    assert {TrainConfig(steps=100, warmup=0, schedule="constant").lr_factor(s) for s in (0, 99)} == {1.0}
    assert TrainConfig(steps=200).warmup_steps == 20 and TrainConfig(steps=10**6).warmup_steps == 1000


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grad_clp": 1.0}, r"no setting 'grad_clp' \(did you mean grad_clip"),
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"accumulate": 1.5}, "accumulate must be an integer of at least 1, not 1.5"),
        ({"schedule": "cos"}, "schedule must be one of cosine, linear, constant, none, not 'cos'"),
        ({"lr": -1.0}, "lr must be a positive number, not -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive, or None"),
        ({"precision": "fp17"}, "unknown format 'fp17'"),
        (
            {"precision": "e4m3"},
            "'e4m3' is not one to train a whole model in; allowed: fp32, tf32, bf16, fp16, or a plan",
        ),
        ({"precision": "bf16", "plan": PrecisionPlan.uniform("fp32")}, "a plan or precision='bf16', not both"),
        ({"device": "cuda:99"}, "cannot use device 'cuda:99' .* this machine offers"),
        ({"device": "gpu"}, "cannot use device 'gpu'"),
        ({"resume": True}, "resume=True needs out="),
        ({"exist": "replace"}, "exist must be 'error' or 'overwrite', not 'replace'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        train(regression(), **{"steps": 2, **arguments})
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tf32_needs_a_gpu():
    with pytest.raises(UsageError, match="'tf32' needs an NVIDIA GPU of compute capability 8.0 or later, .* on cpu"):
        train(regression(), steps=2, precision="tf32")


def test_long_names_of_formats_are_understood():
    assert train(regression(), steps=1, precision="bfloat16").precision == "bf16"


def test_a_task_may_be_named_or_a_function():
    assert train(partial(gpt, "tiny"), steps=1).losses == train(tiny(), steps=1).losses


# files, callbacks


def test_a_run_directory_tells_the_run(tmp_path):
    result = train(
        regression(), steps=9, precision="fp16", initial_scale=256.0, out=tmp_path / "a", eval_every=4, seed=7
    )
    log = pd.read_parquet(tmp_path / "a" / "train.parquet")
    assert tuple(log.loss) == result.losses
    assert log.scale.tolist() == [256.0] * 9 and (log.grad_norm > 0).all() and (log.time_ms > 0).all()
    assert (log.memory_bytes > 1e6).all() and not log.skipped.any() and not log.nonfinite.any()
    assert log.eval_loss.notna().tolist() == [s in (3, 7, 8) for s in range(9)]
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert {"schema": 1, "status": "done", "precision": "fp16", "seed": 7, "device": "cpu"}.items() <= run.items()
    assert run["eval_loss"] == result.eval_loss and run["loss_scale"]["initial"] == 256.0
    assert run["train"]["steps"] == 9 and run["peak_memory_bytes"] == result.peak_memory_bytes
    assert ("through fp32 on this CPU" in run["note"]) == needs_half_matmul()
    assert tuple(read_log(tmp_path / "a")[0])[:2] == (0, result.losses[0])


def test_an_existing_run_is_kept_unless_told_otherwise(tmp_path):
    train(regression(), steps=4, out=tmp_path / "a", checkpoint_every=2)
    with pytest.raises(UsageError, match="already holds a run"):
        train(regression(), steps=2, out=tmp_path / "a")
    assert len(read_log(tmp_path / "a")) == 4
    train(regression(), steps=2, out=tmp_path / "a", exist="overwrite")
    assert len(read_log(tmp_path / "a")) == 2
    assert not list((tmp_path / "a" / "checkpoints").iterdir()), "checkpoints of the run before would mislead a resume"


def test_an_unwritable_directory_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    task = regression()
    before = parameters(task)
    with pytest.raises(RunDirectoryError, match="choose another directory"):
        train(task, steps=2, out=tmp_path / "file" / "run")
    assert torch.equal(parameters(task), before)


def test_a_loop_that_raises_keeps_its_log_and_says_so(tmp_path):
    def stop(model: nn.Module, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    task = regression(after_step=stop)
    task.model.eval()
    with pytest.raises(KeyboardInterrupt):
        train(task, steps=9, out=tmp_path / "a")
    assert [r.step for r in read_log(tmp_path / "a")] == [0, 1, 2]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "failed"
    assert not task.model.training, "the mode is put back"


def test_progress_and_after_step_are_told_of_each_step():
    told, stepped = [], []
    task = regression(after_step=lambda model, step: stepped.append(step))
    result = train(task, steps=4, progress=lambda done, total, loss: told.append((done, total, loss)))
    assert told == [(i + 1, 4, result.losses[i]) for i in range(4)] and stepped == [0, 1, 2, 3]


class Watch:
    def __init__(self) -> None:
        self.steps, self.told, self.open = 0, {}, True

    def watch(self, **what) -> None:
        self.told = what

    def step(self) -> None:
        assert self.open
        self.steps += 1


def test_a_recorder_is_told_of_optimizer_scaler_and_steps():
    watch = Watch()
    train(regression(), steps=3, accumulate=2, precision="fp16", recorder=watch)
    assert watch.steps == 3
    assert isinstance(watch.told["optimizer"], torch.optim.AdamW)
    assert isinstance(watch.told["scaler"], torch.amp.GradScaler)


def test_a_recorder_made_by_a_function_is_closed_after_failure_too():
    watch = Watch()

    @contextmanager
    def recorder(trainer):
        assert trainer.model is task.model and isinstance(trainer.optimizer, torch.optim.AdamW)
        try:
            yield watch
        finally:
            watch.open = False

    task = with_bad_batches(2)
    with pytest.raises(TrainingError):
        train(task, steps=5, nonfinite_limit=1, recorder=recorder)
    assert watch.steps == 3 and not watch.open


def test_batches_of_any_shape_move_to_a_device():
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    x = torch.ones(2)
    moved = to_device({"a": [x, (x, "text")], "b": Pair(x, None)}, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Pair) and moved["b"].x.is_meta and moved["b"].y is None
    assert to_device(x, nn.Linear(1, 1, device="meta")).is_meta


def test_settings_are_values():
    config = TrainConfig(steps=3)
    assert replace(config, seed=1).seed == 1 and config.seed == 0
