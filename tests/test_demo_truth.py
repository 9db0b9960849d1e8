"""Claims about the demo model, checked on the demo model: watching changes nothing, and histograms answer truly."""

from __future__ import annotations

import math

import pytest
import torch

from precscope.formats import get_format
from precscope.kernels import summarize
from precscope.profiling import train_recorded
from precscope.rounding import quantize
from precscope.tasks import make_task
from precscope.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fifty_demo_steps_are_bit_identical(tmp_path, precision):
    plain, watched = make_task("gpt"), make_task("gpt")
    unseen = train(plain, steps=50, precision=precision, eval_limit=1)
    seen = train_recorded(watched, out=tmp_path / "run", every=1, steps=50, precision=precision, eval_limit=1)
    assert unseen.losses == seen.losses and unseen.eval_loss == seen.eval_loss
    for (name, a), b in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def demo_tensors():
    """Every module output and its gradient, and every parameter and its gradient, of the demo GPT after 12 steps."""
    task = make_task("gpt")
    train(task, steps=12, precision="fp32", eval_limit=1)
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                found[f"{name}.output"] = output.detach().clone()
                output.register_hook(lambda g: found.__setitem__(f"{name}.grad_output", g.detach().clone()))

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in task.model.named_modules()]
    task.model.zero_grad()
    task.loss(task.model, task.batch(99)).backward()
    for handle in handles:
        handle.remove()
    for name, parameter in task.model.named_parameters():
        found[f"{name}.weight"] = parameter.detach().clone()
        if parameter.grad is not None:
            found[f"{name}.grad_weight"] = parameter.grad.clone()
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3", "e5m2"])
def test_answers_equal_real_rounding(demo_tensors, name):
    """Flushed share within 1e-3, SQNR within 1 dB, overflow interval around the truth, at scales 2^-8, 1 and 2^8."""
    fmt = get_format(name)
    worst = {"flushed": 0.0, "sqnr_db": 0.0}
    compared, missed = 0, []
    for label, x in demo_tensors.items():
        stats = summarize(x)
        for k in (-8, 0, 8):
            said = stats.ask(fmt, scale_exponent=k)
            q = quantize(x, fmt, scale_exponent=k).double()
            wide = x.double()
            over = ~q.isfinite()
            share = over.double().mean().item()
            assert said.overflow_lo - 1e-12 <= share <= said.overflow_hi + 1e-12, (label, k)
            flushed = ((q == 0) & (x != 0)).double().mean().item()
            worst["flushed"] = max(worst["flushed"], abs(flushed - said.flushed))
            assert abs(flushed - said.flushed) <= 1e-3, (label, k, flushed, said.flushed)
            kept = ~over
            signal, error = wide[kept].square().sum().item(), (q - wide)[kept].square().sum().item()
            if x.numel() < 4096 or not error or not signal:  # a few values have no statistics: counts are checked above
                continue
            real = 10 * math.log10(signal / error)
            worst["sqnr_db"] = max(worst["sqnr_db"], abs(real - said.sqnr_db))
            compared += 1
            if abs(real - said.sqnr_db) > 1.0:
                missed.append((label, k, real, said.sqnr_db))
    print(f"{name}: {compared} tensors and scales, worst difference {worst}, beyond 1 dB: {missed}")
    assert compared > 200 and len(missed) <= compared / 100
    assert worst["sqnr_db"] <= 2.0, missed
