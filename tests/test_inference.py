"""ps.infer: what a plan does to outputs, answers, memory; the model is left as it was."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import MLP, Convolutional, Output
from torch import nn

from precscope import PrecisionPlan, Task, apply, train
from precscope.batches import seed_everything
from precscope.errors import PlanError, RunDirectoryError, TaskError, UsageError
from precscope.inference import Answer, Latency, infer
from precscope.training.halfmatmul import half_matmul_through_fp32, needs_half_matmul

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Three(nn.Module):
    """Three linear layers, 8 -> 16 -> 16 -> 4."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.layer3(torch.tanh(self.layer2(torch.tanh(self.layer1(x)))))


def batches(count=3, size=6):
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))
            for _ in range(count)]  # fmt: skip


def classify(model, **more):
    seed_everything(0)
    data = batches()
    loss = lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])  # noqa: E731
    return Task(model=model() if callable(model) and not isinstance(model, nn.Module) else model,
                loss=loss, batches=data, **{"eval_batches": data, **more})  # fmt: skip


def by_hand(model, x, formats):
    """The classic: each layer's product in its format, everything between in fp32."""
    for name, fmt in zip(("layer1", "layer2", "layer3"), formats, strict=True):
        layer, dtype = getattr(model, name), DTYPES[fmt]
        x = F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype)).float()
        x = torch.tanh(x) if name != "layer3" else x
    return x


@pytest.mark.parametrize("policy", ["autocast", "cast"])
@pytest.mark.parametrize("formats", [("fp16", "fp32", "fp16"), ("bf16", "fp32", "bf16"), ("fp16", "bf16", "fp32")])
def test_alternating_layers_are_the_hand_written_arithmetic_bit_for_bit(formats, policy):
    task = classify(Three)
    layers = {f"layer{i + 1}": {"compute": fmt, "policy": policy} for i, fmt in enumerate(formats)}
    result = infer(task, plan=PrecisionPlan(modules=layers), repeats=0, keep=3)
    error = signal = largest = 0.0
    with torch.no_grad(), half_matmul_through_fp32():
        for (x, _), (reference, output) in zip(batches(), result.kept, strict=True):
            assert torch.equal(reference, by_hand(task.model, x, ("fp32", "fp32", "fp32")))
            assert torch.equal(output, by_hand(task.model, x, formats)), "not the arithmetic written down"
            assert not torch.equal(output, reference)
            difference = (output.double() - reference.double()).abs()
            error, signal = error + float((difference**2).sum()), signal + float((reference.double() ** 2).sum())
            largest = max(largest, float(difference.max()))
    (row,) = result.outputs
    assert row.relative_l2 == pytest.approx(math.sqrt(error / signal), rel=1e-12)
    assert row.sqnr_db == pytest.approx(10 * math.log10(signal / error), rel=1e-12)
    assert (row.max_abs, row.count, row.shape, row.nonfinite) == (largest, 72, (6, 4), 0)
    assert result.modules["fp32"] == 1 + formats.count("fp32")


def test_fp32_beside_fp32_is_exact():
    result = infer(classify(MLP), precision="fp32", repeats=1)
    assert (result.relative_l2, result.outputs[0].sqnr_db, result.outputs[0].equal) == (0.0, math.inf, 1.0)
    assert result.answer.agreement == 1.0 and result.loss.reference == result.loss.value
    assert "exact" in str(result)


def bits(tensors):
    return {name: t.detach().clone() for name, t in tensors}


@pytest.mark.parametrize("policy", ["autocast", "cast"])
def test_the_model_and_the_generators_are_left_bit_for_bit(policy):
    seed_everything(3)
    model = nn.Sequential(Convolutional(), nn.Dropout(0.5))
    model[0].bn.eval()
    task = classify(model)
    model[0].head.weight.grad = torch.ones(4, 4)
    before = bits([*model.named_parameters(), *model.named_buffers()])
    identities = [id(p) for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    infer(task, plan=PrecisionPlan.uniform("bf16", policy=policy), repeats=2)
    after = bits([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(before[n], after[n]) and before[n].dtype is after[n].dtype for n in before)
    assert [id(p) for p in model.parameters()] == identities and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and modes.count(False) == 1
    assert torch.equal(model[0].head.weight.grad, torch.ones(4, 4))


def test_an_error_leaves_the_model_too():
    class Fails(MLP):
        def forward(self, x):
            if self.fc1.weight.dtype is torch.bfloat16:
                raise RuntimeError("not in bf16")
            return super().forward(x)

    task = classify(Fails)
    with pytest.raises(RuntimeError, match="not in bf16"):
        infer(task, plan=PrecisionPlan.uniform("bf16", policy="cast"))
    assert task.model.training and task.model.fc1.weight.dtype is torch.float32


def test_randomness_in_the_forward_is_the_same_in_both():
    class Noisy(MLP):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    result = infer(classify(Noisy), precision="bf16", repeats=0)
    assert 0 < result.relative_l2 < 0.02


def test_inputs_that_the_model_writes_to_are_fresh_each_time():
    class Writes(MLP):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    task = classify(Writes)
    before = [x.clone() for x, _ in task.eval_batches]
    assert infer(task, precision="fp32", repeats=2).relative_l2 == 0
    assert all(torch.equal(a, x) for a, (x, _) in zip(before, task.eval_batches, strict=True))


# Answers


def test_top_1_agreement_counts_classes_that_change():
    """Two classes whose logits differ by less than bf16 tells apart at 1.0: one of four rows changes its class."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 1.0], [1.0, 1.0 + 2**-10]])
    task = Task(model=model, loss=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
                batches=[(x, torch.tensor([1, 0, 0, 1]))])  # fmt: skip
    answer = infer(task, precision="bf16", repeats=0, batches=1).answer
    assert (answer.kind, answer.agreement, answer.count) == ("top-1", 0.75, 4)
    ignored = Task(model=model, loss=task.loss, batches=[(x, torch.tensor([1, 0, 0, -100]))])
    answer = infer(ignored, precision="bf16", repeats=0, batches=1).answer
    assert (answer.agreement, answer.count) == (1.0, 3)


def test_tokens_agree_over_sequences():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, tokens):
            return self.head(self.emb(tokens))

    seed_everything(0)
    data = [(torch.randint(11, (2, 5)), torch.randint(11, (2, 5))) for _ in range(2)]
    loss = lambda m, b: F.cross_entropy(m(b[0]).float().flatten(0, 1), b[1].flatten())  # noqa: E731
    task = Task(model=Tokens(), loss=loss, batches=data)
    result = infer(task, plan=PrecisionPlan.uniform("e4m3"), repeats=0, batches=2, keep=2)
    same = [(r.argmax(-1) == y.argmax(-1)).flatten() for r, y in result.kept]
    assert (result.answer.kind, result.answer.count) == ("tokens", 20)
    assert result.answer.agreement == pytest.approx(float(torch.cat(same).float().mean()))
    assert "the same token at" in str(result) and any("emulated" in n for n in result.notes)


def test_segmentation_finds_the_class_dimension():
    model = nn.Conv2d(1, 3, 1)
    data = [(torch.randn(2, 1, 4, 5), torch.randint(3, (2, 4, 5)))]
    task = Task(model=model, loss=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), batches=data)
    answer = infer(task, precision="bf16", repeats=0, batches=1).answer
    assert (answer.kind, answer.count) == ("top-1", 40)


def test_binary_logits_agree_by_sign():
    model = nn.Linear(8, 1)
    data = [(x, (y > 1).float()[:, None]) for x, y in batches(2)]
    loss = lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).float(), b[1])  # noqa: E731
    task = Task(model=model, loss=loss, batches=data)
    answer = infer(task, precision="bf16", repeats=0, batches=2).answer
    assert (answer.kind, answer.count) == ("sign", 12)


def test_regression_has_no_answer_and_it_says_so_unless_told():
    data = [(x, x.sum(1, keepdim=True)) for x, _ in batches(2)]
    task = Task(model=MLP(out=4), loss=lambda m, b: (m(b[0]) - b[1]).square().mean(), batches=data)
    result = infer(task, precision="bf16", repeats=0, batches=2)
    assert (result.answer.kind, result.answer.agreement) == ("none", None)
    assert "answer: not applicable" in str(result)
    assert infer(task, precision="bf16", repeats=0, batches=2, answer="top-1").answer.count == 12
    assert infer(task, precision="bf16", repeats=0, batches=2, answer="sign").answer.count == 48
    with pytest.raises(UsageError, match="answer must be one of auto, top-1, sign, none, not 'best'"):
        infer(task, precision="bf16", answer="best")


def test_an_input_of_integers_is_no_target():
    task = Task(model=nn.Embedding(9, 16), loss=lambda m, b: m(b).sum(), batches=[torch.randint(9, (3, 4))])
    assert infer(task, precision="bf16", repeats=0, batches=1).answer.kind == "none"


# How the model is called, and what it returns


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, *, scale=1.0):
        y = self.fc(x) * scale
        return Output(logits=y, hidden=(y * 2, x > 0))


def test_every_floating_output_is_compared_by_name():
    task = Task(model=Many(), loss=lambda m, b: m(**b).logits.float().mean(), batches=[{"x": batches(1)[0][0]}])
    result = infer(task, precision="bf16", repeats=0, batches=1)
    assert [o.name for o in result.outputs] == ["logits", "hidden.0"]
    assert result.answer.kind == "top-1" and result.answer.why == "the output is called logits"
    assert result.call == "the model as the task's loss calls it"


def test_keyword_arguments_are_those_of_the_loss():
    task = Task(model=Many(), loss=lambda m, b: m(b[0], scale=3.0).logits.float().mean(), batches=batches())
    (reference, _), *_ = infer(task, precision="bf16", repeats=0).kept
    assert torch.equal(reference.logits, task.model(batches()[0][0], scale=3.0).logits)


def test_forward_of_the_task_is_preferred():
    task = classify(MLP, forward=lambda m, b: {"probability": m(b[0]).softmax(-1)})
    result = infer(task, precision="bf16", repeats=0)
    assert result.outputs[0].name == "probability" and result.call == "task.forward(model, batch)"


def test_a_loss_that_fails_or_calls_twice_leaves_the_batch_to_the_model():
    def needs_gradients(model, batch):
        loss = model(batch[0]).mean()
        return torch.autograd.grad(loss, model.fc1.weight)[0].sum()

    data = [(x,) for x, _ in batches()]
    result = infer(Task(model=MLP(), loss=needs_gradients, batches=data), precision="bf16", repeats=0, batches=2)
    assert result.loss is None and any("no loss: it fails without gradients" in n for n in result.notes)
    assert result.call.startswith("model(*batch): the loss cannot be run without gradients")
    twice = Task(model=MLP(), loss=lambda m, b: (m(b[0]) - m(-b[0])).mean(), batches=data)
    result = infer(twice, precision="bf16", repeats=0, batches=1)
    assert result.call == "model(*batch): the loss calls the model 2 times" and result.loss is not None


def test_a_batch_that_no_one_explains_is_an_error():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

    task = Task(model=MLP(), loss=lambda m, b: (m(b.x) - m(-b.x)).mean(), batches=[Batch(torch.ones(2, 8))])
    with pytest.raises(TaskError, match="cannot tell how the model is called on a batch of type Batch"):
        infer(task, precision="bf16")


def test_what_overflows_is_counted_and_told():
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0] = 2e4
    data = [(torch.ones(3, 8), torch.zeros(3, dtype=torch.long))]
    task = Task(model=model, loss=lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]), batches=data)
    result = infer(task, precision="fp16", repeats=0, batches=1)
    assert (result.nonfinite, result.outputs[0].nonfinite_reference, result.outputs[0].count) == (3, 0, 12)
    assert math.isfinite(result.relative_l2), "the error is that of the finite elements"
    assert "output output: 3 of 12 values are inf or NaN in fp16 and 0 in fp32" in " ".join(str(result).split())


def test_where_nothing_is_finite_no_error_is_claimed():
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.bias.fill_(7e4)  # beyond fp16: every logit becomes inf
    result = infer(classify(model), precision="fp16", repeats=0)
    (row,) = result.outputs
    assert all(map(math.isnan, (row.relative_l2, row.sqnr_db, row.max_abs, result.relative_l2)))
    assert (row.nonfinite, row.nonfinite_reference, row.count) == (72, 0, 72) and "exact" not in str(result)
    assert (result.answer.agreement, result.answer.count) == (0.0, 18), "inf in all classes is no answer"
    with torch.no_grad():
        model.bias.fill_(math.nan)
    broken = infer(classify(model), precision="bf16", repeats=0)
    assert math.isnan(broken.relative_l2) and broken.answer.agreement == 0.0
    assert infer(classify(model), precision="bf16", repeats=0, answer="sign").answer.agreement == 0.0


def test_hundred_percent_means_all():
    assert "at 100% of 64 positions" in str(Answer("top-1", 1.0, 64, "as asked"))
    assert "at all but 3 of 1,000,000 positions" in str(Answer("tokens", 1 - 3e-6, 1_000_000, "as asked"))
    assert "at 98.44% of 64 positions" in str(Answer("sign", 63 / 64, 64, "as asked"))


def test_batches_whose_outputs_differ_are_refused():
    class Sometimes(MLP):
        def forward(self, x):
            y = super().forward(x)
            return {"first": y} if len(x) == 6 else {"other": y}

    data = [*batches(1), *batches(1, size=5)]
    task = classify(Sometimes, eval_batches=data, forward=lambda m, b: m(b[0]))
    with pytest.raises(TaskError, match="returned first for the first batch and other for another: compare outputs"):
        infer(task, precision="bf16", repeats=0)


def test_a_mask_of_infinities_is_no_difference():
    class Masked(MLP):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(4) == 2, -math.inf)

    result = infer(classify(Masked), precision="bf16", repeats=0)
    assert result.outputs[0].nonfinite == result.outputs[0].nonfinite_reference == 18
    assert 0 < result.relative_l2 < 0.02


# Memory and latency


def test_memory_of_weights_and_of_the_run():
    """x [6, 8] is there before; fc1 and GELU make [6, 16] each, GELU's input dies when it returns; fc2 [6, 4]."""
    task = classify(MLP)
    result = infer(task, plan=PrecisionPlan.uniform("bf16", policy="cast"), repeats=0)
    parameters = sum(p.numel() for p in task.model.parameters())
    assert (result.memory.weights_reference, result.memory.weights) == (4 * parameters, 2 * parameters)
    assert result.memory.working_reference == 4 * (96 + 96)
    assert result.memory.working == 2 * (96 + 96 + 48), "the input, cast, is held by the caller's frame"
    assert infer(task, precision="bf16", repeats=0).memory.weights == 4 * parameters


def test_latency_in_pairs_and_none():
    task = classify(MLP)
    latency = infer(task, precision="bf16", repeats=5).latency
    assert latency.pairs == 5 and latency.ratio_low <= latency.ratio <= latency.ratio_high
    assert latency.ms > 0 and latency.reference_ms > 0
    result = infer(task, precision="bf16", repeats=0)
    assert result.latency.pairs == 0 and math.isnan(result.latency.ratio) and "ms per batch" not in str(result)
    said = " ".join(str(dataclasses.replace(result, latency=Latency(2.0, 1.0, 2.0, 0.8, 2.5, 4))).split())
    assert "2.00x faster" in said
    assert "medians of 4 pairs of runs in turns, half of them between 1.25x slower and 2.50x faster" in said


@pytest.mark.skipif(not needs_half_matmul(), reason="this CPU multiplies fp16 matrices")
def test_latency_of_fp16_without_fp16_products_is_not_passed_off_as_such():
    notes = " ".join(infer(classify(MLP), precision="fp16", repeats=1).notes)
    assert "fp16 matrix products computed through fp32 on this CPU" in notes
    assert "not that of hardware with the format" in notes


# Weights of a run, files, the command line


def test_the_newest_checkpoint_of_a_run_gives_the_weights(tmp_path):
    trained = train(classify(MLP), steps=4, out=tmp_path / "run", precision="fp32", checkpoint_every=2, eval_every=4)
    task = classify(MLP)
    start = bits(task.model.named_parameters())
    result = infer(task, plan=PrecisionPlan.uniform("bf16"), run=tmp_path / "run", repeats=0)
    assert result.step == 4 and result.loss.reference == pytest.approx(trained.eval_loss, rel=1e-6)
    assert result.loss.reference != infer(task, precision="bf16", repeats=0).loss.reference
    assert all(torch.equal(p, start[n]) for n, p in task.model.named_parameters())
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match=r"empty has no checkpoint: train with --checkpoint-every N"):
        infer(task, precision="bf16", run=tmp_path / "empty")


def test_a_model_stored_low_has_a_true_fp32_reference():
    task = classify(MLP().bfloat16())
    result = infer(task, plan=PrecisionPlan.uniform("bf16", policy="cast"), repeats=0)
    assert result.kept[0][0].dtype is torch.float32 and result.kept[0][1].dtype is torch.bfloat16
    assert 0 < result.relative_l2 < 0.02 and any("cast up" in n for n in result.notes)
    assert task.model.fc1.weight.dtype is torch.bfloat16


def test_training_batches_where_there_are_no_others():
    result = infer(classify(MLP, eval_batches=None), precision="bf16", batches=2, repeats=0)
    assert (result.batches, result.held_out) == (2, False) and "2 training batches" in str(result)


def test_the_file_and_the_table(tmp_path, monkeypatch):
    result = infer(classify(MLP), plan=PrecisionPlan.uniform("fp16"), repeats=2, out=tmp_path / "deep" / "infer")
    content = json.loads((tmp_path / "deep" / "infer" / "infer.json").read_text())
    assert (content["schema"], content["kind"], content["batches"]) == (1, "inference", 3)
    assert content["outputs"][0]["relative_l2"] == result.outputs[0].relative_l2
    assert content["plan"]["default"]["compute"] == "fp16" and content["about"]["torch"] == torch.__version__
    assert content == json.loads(json.dumps(result.to_dict()))
    assert max(map(len, str(result).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "62")
    assert 60 <= max(map(len, str(result).splitlines())) <= 62
    with pytest.raises(RunDirectoryError, match="cannot make .*infer.json.*choose another directory"):
        infer(classify(MLP), precision="bf16", repeats=0, out=tmp_path / "deep" / "infer" / "infer.json")


@pytest.mark.parametrize("given, error, message", [
    ({}, UsageError, "give what to infer with: plan= .* or precision="),
    ({"precision": "bf16", "plan": PrecisionPlan()}, UsageError, "not both"),
    ({"precision": "e4m3"}, UsageError, "precision 'e4m3' is not one to train a whole model in"),
    ({"precision": "bf16", "batches": 0}, UsageError, "batches must be 1 or more, or None for all, not 0"),
    ({"precision": "bf16", "repeats": -1}, UsageError, "repeats must be 0 .* or more, not -1"),
    ({"plan": 3}, UsageError, "plan must be a PrecisionPlan or its file, not int"),
    ({"plan": PrecisionPlan(phases=[{"from_step": 0, "precision": "bf16"}])}, UsageError, r"plan.at_step\(step\)"),
    ({"plan": PrecisionPlan(modules={"fc9": "bf16"})}, PlanError, "no module 'fc9' .did you mean fc"),
])  # fmt: skip
def test_what_cannot_be_inferred_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        infer(classify(MLP), **given)


def test_a_model_with_a_plan_on_it_is_refused():
    task = classify(MLP)
    with apply(PrecisionPlan.uniform("bf16"), task.model):
        with pytest.raises(PlanError, match="a plan is applied to this model already: remove it"):
            infer(task, precision="fp16")


TASK = """
import torch, precscope as ps
from torch import nn

def make():
    def batch(step):
        g = torch.Generator().manual_seed(step)
        return torch.randn(8, 16, generator=g), torch.randint(0, 4, (8,), generator=g)
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    return ps.Task(model=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), loss=loss, batches=batch,
                   eval_batches=[batch(99), batch(98)])
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    from precscope.cli import main

    (tmp_path / "task.py").write_text(TASK)
    PrecisionPlan(modules={"0": "bf16"}).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    line = "precscope infer task.py:make --plan plan.json --repeats 2 --out runs/infer"
    monkeypatch.setattr("sys.argv", line.split())
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert not stop.value.code and not said.err
    assert "beside fp32, 2 held-out batches on" in said.out and "answer: the same class at" in said.out
    assert "wrote runs/infer/infer.json" in said.out
    assert "next: precscope export task.py:make --plan plan.json --out model.pt2" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
