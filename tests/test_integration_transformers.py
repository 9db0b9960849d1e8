"""Hugging Face's Trainer recorded and trained with a plan, beside plain loops on the same batches; generation."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_distributed import differences, rows

import precscope as ps
from precscope.errors import PlanError, UsageError

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what transformers imports where it is installed
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from precscope.integrations.transformers import RecordCallback, planned, record_generation, train_with_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
transformers.logging.set_verbosity_error()

STEPS, SIZE = 6, 4
ISLANDS = ps.PrecisionPlan(default="bf16", modules={"transformer.h.0.mlp": "fp32"})
HALF = ps.PrecisionPlan(default="fp16", modules={"lm_head": "fp32"}, loss_scale={"initial": 1024.0})


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    kinds = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                                      eos_token_id=0, **kinds))  # fmt: skip


def texts(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 64, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in drawn]


def make(model, folder, *callbacks, data=None, kind=Trainer, **settings) -> Trainer:
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": SIZE, "use_cpu": True, "report_to": [], "seed": 0,
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "learning_rate": 1e-2, "optim": "adamw_torch", "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    data = data or texts()
    return kind(model, TrainingArguments(str(folder / "trainer"), **settings), train_dataset=data,
                eval_dataset=data[:SIZE], callbacks=[*callbacks, Quiet()])  # fmt: skip


class Quiet(TrainerCallback):
    """Keeps what the Trainer prints."""

    def on_init_end(self, *args, **kwargs):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def logs_of(trainer: Trainer) -> list[dict]:
    return next(c.logs for c in trainer.callback_handler.callbacks if isinstance(c, Quiet))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(transformers.trainer_callback.PrinterCallback, "on_log", lambda *args, **kwargs: None)


def plain_loop(model, *, accumulate=1, out=None, scaler=None, steps=STEPS, clip=1.0, **recording):
    """What the Trainer does, by hand: AdamW, the loss divided by the labels of a step, clipping. -> losses"""
    data, losses = texts(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    with ps.record(model, out, optimizer=optimizer, scaler=scaler, **recording) if out else open(os.devnull) as rec:
        for step in range(steps):
            first = step * accumulate * SIZE
            micro = [torch.stack([d["input_ids"] for d in data[i : i + SIZE]])
                     for i in range(first, first + accumulate * SIZE, SIZE)]  # fmt: skip
            labels, total = sum(x.numel() for x in micro), 0.0
            for x in micro:
                loss = model(input_ids=x, labels=x, num_items_in_batch=torch.tensor(float(labels))).loss
                (loss if scaler is None else scaler.scale(loss)).backward()
                total += loss.detach()
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
            optimizer.zero_grad()
            losses.append(total)
            if out:
                rec.step()
    return losses


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def equal_rows(a: Path, b: Path, skip: tuple[str, str] | None = None) -> bool:
    """To the last bit; skip: module and tensor of rows that are left out."""
    ours, theirs = ({k: v for k, v in rows(ps.Profile.load(p)).items() if (k[1], k[4]) != skip} for p in (a, b))
    assert ours.keys() == theirs.keys()
    return all(str(ours[k][0]) == str(theirs[k][0]) and np.array_equal(ours[k][1], theirs[k][1]) for k in ours)


# recording


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_are_those_of_a_plain_loop(tmp_path, accumulate):
    """Every row of every role, to the last bit, although the Trainer evaluates between two steps."""
    model = gpt2()
    trainer = make(model, tmp_path, RecordCallback(tmp_path / "hf", every=2), gradient_accumulation_steps=accumulate,
                   eval_strategy="steps", eval_steps=1)  # fmt: skip
    trainer.train()
    reference = gpt2()
    plain_loop(reference, accumulate=accumulate, out=tmp_path / "plain", every=2)
    assert same(weights(model), weights(reference))
    assert equal_rows(tmp_path / "hf", tmp_path / "plain")
    run = ps.Profile.load(tmp_path / "hf").run
    assert (run["status"], run["recorded_steps"], run["precision"]) == ("done", 3, "fp32")
    assert (run["accumulate"], run["optimizers"][0]["class"]) == (accumulate, "AdamW")
    assert run["trainer"] == f"transformers {transformers.__version__}"


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "optim": "adamw_torch_fused"}], ids=str)
def test_watching_changes_no_number(tmp_path, settings):
    """Losses and weights, with dropout, evaluations and shadow steps."""
    settings = {**settings, "logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    found = []
    for name in ("watched", "alone"):
        callbacks = [RecordCallback(tmp_path / name, every=2, shadow_every=2)] if name == "watched" else []
        model = gpt2(dropout=0.1)
        trainer = make(model, tmp_path, *callbacks, gradient_accumulation_steps=2, **settings)
        trainer.train()
        logs = logs_of(trainer)
        found.append(([(x.get("loss"), x.get("grad_norm"), x.get("eval_loss")) for x in logs], weights(model)))
    assert found[0][0] == found[1][0] and len(found[0][0]) > STEPS
    assert same(found[0][1], found[1][1])
    profile = ps.Profile.load(tmp_path / "watched")
    assert profile.run["precision"] == ("bf16" if settings.get("bf16") else "fp32")
    linear = profile.history().query("module == 'transformer.h.0.mlp.c_fc' and role == 'output'")
    assert set(linear.source) == {"bf16" if settings.get("bf16") else "fp32"}


def test_shadow_steps_price_the_trainers_own_loss(tmp_path):
    """Two micro-batches: the loss of the step, and fp32 gradients equal to those of an fp32 run."""
    settings = {"logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=2, shadow_every=4), **settings)
    trainer.train()
    profile, logs = ps.Profile.load(tmp_path / "a"), logs_of(trainer)
    assert sorted(set(profile.truth.step)) == [0, 4]
    of_step = profile.truth.groupby("step")[["loss_low", "loss_fp32"]].first()
    for step in (0, 4):
        assert of_step.loss_low[step] == pytest.approx(logs[step]["loss"], rel=1e-4)
        assert of_step.loss_fp32[step] == pytest.approx(of_step.loss_low[step], rel=1e-5)
    assert profile.truth.cosine.min() > 0.9999
    assert profile.ask("bf16", roles=["output"]).loss_noise.notna().all()
    assert "training_step" not in vars(trainer) and "_run_epoch" not in vars(trainer)


class OwnBackward(Trainer):
    """As Trainer's own, but for how often accelerator.backward is called."""

    calls = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not self.calls:
            loss.backward()
        for _ in range(self.calls):
            self.accelerator.backward(loss / self.calls, retain_graph=True)
        return loss.detach()


@pytest.mark.parametrize("calls", [0, 2])
def test_shadow_steps_need_the_loss_in_one_piece(tmp_path, calls):
    trainer = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1, shadow_every=1), kind=OwnBackward)
    trainer.calls = calls
    message = f"calls accelerator.backward once, and that of OwnBackward calls it {calls} times: leave shadow_every out"
    with pytest.raises(UsageError, match=message):
        trainer.train()
    assert "backward" not in vars(trainer.accelerator)
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "b", every=1), kind=OwnBackward, max_steps=1).train()


def test_a_backward_of_the_users_stays_where_it_is(tmp_path):
    trainer = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=2, shadow_every=2), max_steps=4)
    seen, own = [], trainer.accelerator.backward

    def backward(loss, **kwargs):
        seen.append(trainer.state.global_step)
        own(loss, **kwargs)

    trainer.accelerator.backward = backward
    trainer.train()
    assert seen == [0, 1, 2, 3]  # the shadow steps of 0 and 2 did without
    assert vars(trainer.accelerator)["backward"] is backward


def test_a_step_is_an_optimizer_step_in_epochs_too(tmp_path):
    """10 batches, 4 to a step: 3 steps an epoch, the last of 2 batches."""
    callback = RecordCallback(tmp_path / "a", every=1)
    trainer = make(gpt2(), tmp_path, callback, data=texts(10 * SIZE), max_steps=-1, num_train_epochs=2,
                   gradient_accumulation_steps=4)  # fmt: skip
    trainer.train()
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.steps == tuple(range(6)) or list(profile.steps) == list(range(6))
    counts = profile.history().query("module == 'lm_head' and role == 'input'")["count"]
    assert counts.tolist() == [n * SIZE * 12 * 16 for n in (4, 4, 2, 4, 4, 2)]
    assert callback.recorder is None and trainer.state.global_step == 6


def test_a_resumed_run_goes_on_with_its_directory(tmp_path):
    """Trained 5 steps, gone on with from the checkpoint of step 3: as if it had never stopped."""
    settings = {"save_strategy": "steps", "save_steps": 3, "bf16": True}
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "whole", every=1), bf16=True).train()
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1), **{**settings, "max_steps": 5}).train()
    again = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    assert equal_rows(tmp_path / "a", tmp_path / "whole")
    assert ps.Profile.load(tmp_path / "a").run["status"] == "done"


class Failing(Trainer):
    error: BaseException = RuntimeError("the data ended")

    def compute_loss(self, model, inputs, **kwargs):
        if self.state.global_step == 3:
            model(**{k: v for k, v in inputs.items() if k != "labels"})  # a forward pass whose step never ends
            raise self.error
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("error", [RuntimeError("the data ended"), KeyboardInterrupt("stop")], ids=["error", "ctrl-c"])
def test_an_error_loses_nothing_and_leaves_nothing(tmp_path, error):
    callback = RecordCallback(tmp_path / "a", every=1)
    trainer = make(gpt2(), tmp_path, callback, kind=Failing)
    trainer.error = error
    with pytest.raises(type(error), match=str(error)):
        trainer.train()
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.run["status"] == "failed" and str(error) in profile.run["error"]
    assert profile.run["recorded_steps"] == 3 and {0, 1, 2} <= set(profile.steps)
    assert callback.recorder is None and "_run_epoch" not in vars(trainer)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_mistakes_are_told(tmp_path):
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=5), max_steps=1).train()
    trainer = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a"), max_steps=1)
    with pytest.raises(UsageError, match="a already holds a run: choose another directory, or pass exist='overwrite'"):
        trainer.train()
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", exist="overwrite"), max_steps=1).train()
    with pytest.raises(UsageError, match="nn.DataParallel, which the Trainer uses for 2 GPUs in one process: start it"):
        RecordCallback(tmp_path / "b").on_train_begin(SimpleNamespace(n_gpu=2), None, None)
    with pytest.raises(UsageError, match="every, flush_every and max_calls must be 1 or more, not 0"):
        make(gpt2(), tmp_path, RecordCallback(tmp_path / "b", every=0), max_steps=1).train()


class Hungry(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        if self.state.global_step == 1 and len(inputs["labels"]) == SIZE:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_a_run_that_begins_again_with_smaller_batches_is_recorded_anew(tmp_path):
    """auto_find_batch_size: what the first try recorded goes."""
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1), kind=Hungry, auto_find_batch_size=True).train()
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.run["status"] == "done" and list(profile.steps) == list(range(STEPS))
    counts = profile.history().query("module == 'lm_head' and role == 'input'")["count"]
    assert set(counts) == {(SIZE - 1) * 12 * 16}


class HungryLater(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        if self.state.global_step == 4 and len(inputs["labels"]) == SIZE:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, **kwargs)


def test_a_resumed_run_that_finds_smaller_batches_keeps_what_was_before_the_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "auto_find_batch_size": True}
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1), **{**settings, "max_steps": 3}).train()
    again = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a", every=1), kind=HungryLater, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.run["status"] == "done" and list(profile.steps) == list(range(STEPS))
    counts = profile.history().query("module == 'lm_head' and role == 'input'")["count"]
    assert counts.tolist() == [SIZE * 12 * 16] * 3 + [(SIZE - 1) * 12 * 16] * 3


def test_fp16_on_the_cpu_is_called_what_it_is(tmp_path):
    """Accelerate has no fp16 autocast there: the run is fp32."""
    make(gpt2(), tmp_path, RecordCallback(tmp_path / "a"), fp16=True, max_steps=1).train()
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.run["precision"] == "fp32" and set(profile.history().source) == {"fp32"}


def test_a_classifier_with_the_trainers_own_defaults(tmp_path):
    """BERT, shuffled batches, dropout, a schedule, the fused optimizer."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    data = [{**d, "labels": i % 2} for i, d in enumerate(texts(32))]
    args = TrainingArguments(str(tmp_path / "t"), use_cpu=True, report_to=[], disable_tqdm=True, num_train_epochs=1,
                             save_strategy="no", dataloader_pin_memory=False)  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[RecordCallback(tmp_path / "a", every=2)]).train()
    profile = ps.Profile.load(tmp_path / "a")
    assert profile.run["recorded_steps"] == 2 and profile.run["model"] == "BertForSequenceClassification"
    assert {"input", "output", "weight", "grad_input", "grad_output", "grad_weight", "update", "state"} == set(
        profile.ask("bf16").role
    )


# a plan


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=str)
def test_training_with_a_plan_is_that_of_a_plain_loop(tmp_path, settings):
    """Bit for bit, and bf16=True changes nothing: the plan decides."""
    model, reference = gpt2(), gpt2()
    path = ISLANDS.save(tmp_path / "plan.json")
    trainer = make(model, tmp_path, RecordCallback(tmp_path / "hf", every=3), gradient_accumulation_steps=2, **settings)
    result = train_with_plan(trainer, path)
    with ps.apply(ISLANDS, reference):
        losses = plain_loop(reference, accumulate=2, out=tmp_path / "plain", every=3)
    assert same(weights(model), weights(reference))
    assert result.training_loss == pytest.approx(sum(map(float, losses)) / STEPS, rel=1e-6)
    assert equal_rows(tmp_path / "hf", tmp_path / "plain", skip=("", "logits"))  # given in fp32, as by Accelerate
    history = ps.Profile.load(tmp_path / "hf").history()
    sources = history[history.role == "output"].groupby("module", observed=True).source.unique()
    assert list(sources["transformer.h.0.mlp.c_fc"]) == ["fp32"]
    assert list(sources["transformer.h.1.mlp.c_fc"]) == ["bf16"]
    assert ps.Profile.load(tmp_path / "hf").run["precision"] == "plan"


def test_a_plan_with_fp16_brings_its_loss_scale(tmp_path):
    """On the CPU too, where Accelerate has none; gradients are unscaled before they are clipped."""
    model, reference = gpt2(), gpt2()
    trainer = make(model, tmp_path, RecordCallback(tmp_path / "hf", every=1))
    train_with_plan(trainer, HALF)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with ps.apply(HALF, reference):
        plain_loop(reference, out=tmp_path / "plain", scaler=scaler, every=1)
    assert same(weights(model), weights(reference))
    assert (ps.Profile.load(tmp_path / "hf").history().query("role == 'grad_output'").loss_scale == 1024.0).all()
    assert trainer.accelerator.scaler is None and trainer.optimizer.scaler is None


def test_a_step_that_overflows_is_skipped(tmp_path):
    plan = HALF.replace(loss_scale={"initial": 2.0**40, "growth_interval": 1000})
    model = gpt2()
    start = weights(model)
    trainer = make(model, tmp_path, RecordCallback(tmp_path / "a", every=1), max_steps=2)
    train_with_plan(trainer, plan)
    assert same(weights(model), start)
    scales = ps.Profile.load(tmp_path / "a").history().query("role == 'grad_weight'").groupby("step").loss_scale.first()
    assert scales.tolist() == [2.0**40, 2.0**39]


def test_a_plan_is_taken_off_at_the_end(tmp_path):
    """The saved model is the plain one, and the Trainer trains on as it would have, under its own autocast."""
    model = gpt2()
    trainer = make(model, tmp_path, bf16=True)
    train_with_plan(trainer, ps.PrecisionPlan.uniform("bf16", policy="cast", params="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not vars(model).keys() & {"forward", "_original_forward", "_is_accelerate_prepared"}
    trainer.save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert loaded.dtype is torch.float32 and same(weights(loaded), weights(model))

    trainer.add_callback(callback := RecordCallback(tmp_path / "after", every=5))
    trainer.train()
    trainer.remove_callback(callback)
    assert ps.Profile.load(tmp_path / "after").run["precision"] == "bf16"
    history = ps.Profile.load(tmp_path / "after").history()
    assert set(history.query("module == 'transformer.h.0.mlp.c_fc' and role == 'output'").source) == {"bf16"}

    trainer.args.bf16 = False
    trainer.accelerator.state._mixed_precision = "no"
    trainer.add_callback(RecordCallback(tmp_path / "full", every=5))
    train_with_plan(trainer, ps.PrecisionPlan(default="fp32"))  # whose model was under autocast until now
    assert set(ps.Profile.load(tmp_path / "full").history().source) == {"fp32"}


def test_checkpoints_of_a_planned_run_go_on_bit_for_bit(tmp_path):
    """Parameters stored in bf16, a loss scale in the checkpoint."""
    plan = ps.PrecisionPlan(
        default="fp16", modules={"transformer.h.0": {"compute": "bf16", "policy": "cast", "params": "bf16"}},
        loss_scale={"initial": 256.0, "growth_interval": 2},
    )  # fmt: skip
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = gpt2()
    train_with_plan(make(whole, tmp_path, RecordCallback(tmp_path / "whole", every=1)), plan)
    train_with_plan(make(gpt2(), tmp_path, max_steps=4, **{"save_strategy": "steps", "save_steps": 3}), plan)
    resumed = gpt2()
    trainer = make(resumed, tmp_path, RecordCallback(tmp_path / "a", every=1), **settings)
    train_with_plan(trainer, plan, resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    assert same(weights(resumed), weights(whole))
    whole_rows, rest = rows(ps.Profile.load(tmp_path / "whole")), rows(ps.Profile.load(tmp_path / "a"))
    assert {k[0] for k in rest} == {3, 4, 5} and rest.keys() <= whole_rows.keys()
    assert all(np.array_equal(rest[k][1], whole_rows[k][1]) for k in rest)
    assert {row["loss_scale"] for row, _ in rest.values() if row["loss_scale"] != 1} == {512.0, 1024.0}


def test_evaluation_with_the_plan_and_without(tmp_path):
    trainer = make(gpt2(), tmp_path)
    trainer.train()
    full = trainer.evaluate()["eval_loss"]
    with planned(trainer, ps.PrecisionPlan.uniform("e4m3")) as handle:
        low = trainer.evaluate()["eval_loss"]
        assert "e4m3" in handle.describe()
    assert low != full and low == pytest.approx(full, rel=0.05) and trainer.evaluate()["eval_loss"] == full


def test_an_error_takes_the_plan_off(tmp_path):
    trainer = make(gpt2(), tmp_path, RecordCallback(tmp_path / "a"), kind=Failing)
    with pytest.raises(RuntimeError, match="the data ended"):
        train_with_plan(trainer, HALF)
    assert not any("forward" in vars(m) for m in trainer.model.modules())
    assert trainer.accelerator.scaler is None


@pytest.mark.parametrize(
    ("settings", "plan", "message"),
    [
        ({"fp16": True}, ISLANDS, "fp16=True asks for fp16, and the plan computes in bf16, fp32 only"),
        (
            {"bf16": True},
            HALF,
            "bf16=True asks for bf16, and the plan computes in fp16, fp32 only.*leave bf16=True out",
        ),
        ({"bf16_full_eval": True}, ISLANDS, "bf16_full_eval=True converts the whole model for evaluation"),
        ({}, ISLANDS.replace(phases=[{"from_step": 3, "precision": "fp32"}]), "this plan has phases, which only"),
        ({}, ps.PrecisionPlan(modules={"transformer.g.0": "bf16"}), "transformer.g.0"),
        ({}, {"default": "bf16"}, "plan must be a PrecisionPlan or the path of one, not dict"),
    ],
)
def test_contradictions_are_told_before_training(tmp_path, settings, plan, message):
    trainer = make(gpt2(), tmp_path, **settings)
    with pytest.raises((UsageError, PlanError), match=message):
        train_with_plan(trainer, plan)
    assert trainer.state.global_step == 0


def test_a_model_made_inside_train_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model_init=lambda: gpt2(), args=args, train_dataset=texts())
    with pytest.raises(UsageError, match=r"Trainer\(model_init=...\) makes the model anew"):
        train_with_plan(trainer, ISLANDS)


# generation


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64, eos_token_id=63, pad_token_id=0)
    ).eval()  # fmt: skip


def test_generation_is_recorded_call_by_call(tmp_path):
    """The prompt's pass and one pass per token, with a cache: 12 positions, then 1 for each token but the last."""
    model, prompt = llama(), texts(2)[0]["input_ids"][None]
    options = {"do_sample": True, "max_new_tokens": 5, "min_new_tokens": 5}
    torch.manual_seed(3)
    alone = [model.generate(prompt, **options) for _ in range(3)]
    torch.manual_seed(3)
    with record_generation(model, tmp_path / "g", every=2, info={"prompt": "random"}) as rec:
        watched = [model.generate(prompt, **options)]
        model(prompt)  # not of a generate call
        watched += [model.generate(prompt, **options) for _ in range(2)]
        assert rec.index == 3
    assert same(watched, alone)
    profile = ps.Profile.load(tmp_path / "g")
    assert list(profile.steps) == [0, 2] and profile.run["mode"] == "inference" and profile.run["prompt"] == "random"
    history = profile.history().query("role == 'output'")
    for name, width in (("model.layers.1.self_attn.k_proj", 8), ("model.layers.0.mlp.down_proj", 16)):
        assert history[history.module == name]["count"].tolist() == [(12 + 4) * width] * 2
    assert set(profile.ask("fp16").role) == {"input", "output", "weight"}
    assert "generate" not in vars(model)


def test_generation_under_a_plan_and_errors_in_it(tmp_path):
    model, prompt = llama(), texts(2)[0]["input_ids"][None]
    with ps.apply(ps.PrecisionPlan.uniform("bf16"), model), record_generation(model, tmp_path / "g"):
        model.generate(prompt, max_new_tokens=3, do_sample=False)
    profile = ps.Profile.load(tmp_path / "g")
    assert profile.run["precision"] == "plan"
    assert set(profile.history().query("module == 'lm_head' and role == 'output'").source) == {"bf16"}
    with pytest.raises(ValueError, match="max_new_tokens"), record_generation(model, tmp_path / "h"):
        model.generate(prompt, max_new_tokens=-1)
    assert ps.Profile.load(tmp_path / "h").run["status"] == "failed" and "generate" not in vars(model)
    optimizer = torch.optim.SGD(model.parameters())
    message = "record_generation takes no optimizer=.* Leave it out"
    with pytest.raises(UsageError, match=message), record_generation(model, tmp_path / "i", optimizer=optimizer):
        pass
    assert not (tmp_path / "i").exists()
    with pytest.raises(UsageError, match=r"Linear has no generate\(\)"), record_generation(torch.nn.Linear(2, 2), "x"):
        pass


def test_profile_without_training_sees_generation(tmp_path):
    """ps.profile(train=False), for a table with costs and FLOPs."""
    prompts = [d["input_ids"][None] for d in texts(4)]
    task = ps.Task(
        model=llama(), loss=lambda model, batch: model(batch, labels=batch).loss, batches=prompts,
        forward=lambda model, batch: model.generate(batch, max_new_tokens=3, do_sample=False),
    )  # fmt: skip
    profile = ps.profile(
        task, out=tmp_path / "p", steps=2, every=1, precision="bf16", train=False, costs=False, ops=False
    )
    counts = profile.history().query("module == 'lm_head' and role == 'output'")["count"]
    assert counts.tolist() == [3 * 64] * 2  # generate asks for the last position's logits alone


# several processes

LAUNCHED = """
import sys, warnings
from pathlib import Path
import torch
import test_integration_transformers as t
import precscope as ps
folder, model = Path(sys.argv[1]), t.gpt2()
torch.set_num_threads(1)
callback = t.RecordCallback(folder / "both", every=1, shadow_every=1)
t.train_with_plan(t.make(model, folder, callback, max_steps=2), t.ISLANDS)
torch.save(model.state_dict(), folder / f"weights-{t.os.environ['RANK']}.pt")
"""


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_record_one_run(tmp_path):
    """With a plan: equal to one process that takes both micro-batches, but for the order of fp32 sums."""
    (tmp_path / "script.py").write_text(LAUNCHED)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}",
                   "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(tmp_path / "script.py"), str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    both = ps.Profile.load(tmp_path / "both")
    assert both.run["merged_over"] == 2 and not list(both.path.glob("rank-*"))
    model = gpt2()
    trainer = make(model, tmp_path, RecordCallback(tmp_path / "one", every=1, shadow_every=1), max_steps=2,
                   gradient_accumulation_steps=2)  # fmt: skip
    train_with_plan(trainer, ISLANDS)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.allclose(first[k], v, atol=1e-4) for k, v in model.state_dict().items())
    one = ps.Profile.load(tmp_path / "one")
    assert differences(both, one) < 200
    assert both.truth.loss_fp32.max() == pytest.approx(one.truth.loss_fp32.max(), rel=0.02)  # its own half of the batch
    assert both.truth.cosine.min() == pytest.approx(one.truth.cosine.min(), abs=1e-3)
