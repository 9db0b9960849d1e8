"""Plans beyond autocast: bf16 throughout where it is faster and holds; policy "cast" over fp32 masters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import precscope as ps
from precscope.applying.attention import MOST_KEYS, LowAttention, attend
from precscope.applying.spec import Now
from precscope.confirmation.casting import Watch
from precscope.confirmation.timing import Comparison
from precscope.errors import UsageError
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.training.tasks.gpt import gpt

CAST = LayerPrecision("bf16", policy="cast", params="fp32")
ANYWAY = -1e9  # so many times the time may be lost: whatever the clock says
BF16 = torch.bfloat16


def cast_everywhere(**modules):
    return PrecisionPlan(default=CAST, modules=modules)


class Shift(nn.Module):
    """Adds what it holds."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((16,), by))

    def forward(self, x):
        return x + self.by


def task_of(model):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    y = (x[:, :4] * x[:, 4:8] > 0).float()
    return ps.Task(
        model=model,
        loss=lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).float(), b[1]),
        batches=lambda step: (x + 0.01 * step, y),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
    )


def healthy():
    torch.manual_seed(1)
    return task_of(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4)))


def shifted():
    """What the norm takes is small differences at 2000: fp32 under autocast, since a parameter is added."""
    torch.manual_seed(1)
    return task_of(nn.Sequential(nn.Linear(16, 16), Shift(2000.0), nn.LayerNorm(16), nn.Linear(16, 4)))


def recommended(make, path, **asked):
    profile = ps.profile(make(), out=path, steps=4, precision="bf16", every=2, note=lambda text: None)
    asked = {"formats": ("bf16",), "trial_steps": 6, "beyond_autocast": ANYWAY} | asked
    return ps.recommend(profile, task=make(), **asked)


def cast_modules(plan):
    return {name for name, layer in plan.modules.items() if layer.precision[1] == "cast"}


# recommending


def test_a_healthy_model_leaves_autocast_whole(tmp_path):
    task = healthy()
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    profile = ps.profile(healthy(), out=tmp_path / "run", steps=4, precision="bf16", every=2, note=lambda text: None)
    plan = ps.recommend(profile, formats=("bf16",), task=task, trial_steps=6, beyond_autocast=ANYWAY)
    found = plan.made_from["beyond_autocast"]
    assert plan.status == "confirmed" and plan.confirmed["trial"]["passed"]
    assert found["taken"] and found["variant"] == "cast" and found["kept"] == []
    assert cast_modules(plan) == set(plan.modules) and plan.default.precision == CAST.precision
    assert {layer.params for layer in plan.modules.values()} == {"fp32"}
    assert "without autocast" in plan.made_from["says"]
    reason = plan["0"].reasons[0]
    assert reason.code == "cast" and "its output is bf16, under autocast fp32" in reason.text
    assert reason.numbers["ratio"] == found["ratio"]
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())


def test_reductions_of_small_differences_stay_under_autocast(tmp_path):
    plan = recommended(shifted, tmp_path / "run")
    assert plan.status == "confirmed"
    assert gradient_error(cast_everywhere(), shifted()) > 1.0
    assert {"1", "2"}.isdisjoint(cast_modules(plan)), plan.made_from["beyond_autocast"]
    assert gradient_error(plan, shifted()) < 0.1
    found = plan.made_from["beyond_autocast"]
    assert found["taken"] and {"1", "2"} <= set(found["kept"])
    assert "under autocast still: with it cast as well, " in plan["2"].reasons[0].text


def gradient_error(plan, task):
    exact, got = gradients_of(task, PrecisionPlan.uniform("fp32")), gradients_of(task, plan)
    return relative(*(torch.cat([g.flatten() for g in found.values()]) for found in (got, exact)))


def test_what_is_not_faster_stays_under_autocast(tmp_path):
    plan = recommended(healthy, tmp_path / "run", beyond_autocast=0.99)
    assert cast_modules(plan) == set()
    assert "of the time per step" in plan.made_from["beyond_autocast"]["why"]  # screened out, or lost the duel
    assert "plain bf16 autocast is already right" in plan.made_from["says"]


def test_it_is_not_tried_where_nobody_asked_for_it_or_times_are_modelled(tmp_path):
    for asked in ({"beyond_autocast": False}, {"costs": "model"}):
        plan = recommended(healthy, tmp_path / next(iter(asked)), **asked)
        assert "beyond_autocast" not in plan.made_from and cast_modules(plan) == set()
    with pytest.raises(UsageError, match="beyond_autocast must be True, False, or the share"):
        ps.recommend(tmp_path / "costs", beyond_autocast=1.5)


class WithLoss(nn.Module):
    """Makes its loss itself, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.norm(x)), y)


def with_loss():
    torch.manual_seed(1)
    x, y = torch.randn(64, 16), torch.randint(16, (64,))
    return ps.Task(model=WithLoss(), loss=lambda m, b: m(*b), batches=lambda step: (x + 0.01 * step, y))


def test_a_loss_made_inside_the_model_is_not_rounded(tmp_path):
    plan = recommended(with_loss, tmp_path / "run")
    assert "" not in cast_modules(plan) and "a loss perhaps" in plan[""].reasons[0].text
    assert {"norm", "head"} <= cast_modules(plan)
    task = with_loss()
    with ps.apply(plan, task.model) as handle, handle.autocast():
        assert task.loss(task.model, task.batch(0)).dtype is torch.float32


def test_seen_names_the_innermost_maker_of_a_low_number():
    model = nn.Sequential(WithLoss())
    x, y = torch.randn(4, 16), torch.randint(16, (4,))
    model[0].forward = lambda pair, own=model[0].forward: own(*pair)
    with ps.apply(cast_everywhere(), model), Watch(model) as watch:
        model((x, y)).backward()
    assert watch.seen.scalars == {"", "0"} and watch.seen.innermost_scalars() == {"0"}
    assert watch.seen.outputs["0.norm"] == {"bf16"} and watch.seen.casts > 0


def test_a_gain_must_stand_out_of_the_noise():
    clear = Comparison.of([1.0, 1.1, 0.9, 1.0, 1.0], [0.8, 0.88, 0.72, 0.8, 0.8])
    assert clear.ratio == pytest.approx(0.8) and clear.noise == pytest.approx(0.0, abs=1e-9) and clear.gains(0.03)
    noisy = Comparison.of([1.0] * 5, [0.6, 0.7, 0.9, 1.2, 1.3])
    assert noisy.ratio == pytest.approx(0.9) and not noisy.gains(0.03) and noisy.may_gain(0.03)
    level = Comparison.of([1.0] * 5, [0.98] * 5)
    assert not level.gains(0.03) and not level.may_gain(0.03)


# attention in bf16 throughout


class Attention(nn.Module):
    """Single-head attention whose logits have a common offset, to which softmax is blind. [N, T, 16] -> [N, T, 16]."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.qkv, self.out, self.offset = nn.Linear(16, 48), nn.Linear(16, 16), offset

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        constant = torch.full_like(q[..., :16], self.offset**0.5 / 4)  # adds `offset` to every logit
        q, k = torch.cat([8 * q, constant], -1), torch.cat([k, constant], -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=1.0))


@pytest.mark.parametrize(("offset", "held"), [(0.0, True), (4096.0, False)])
def test_attention_is_cast_only_where_its_softmax_bears_it(tmp_path, offset, held):
    def make():
        torch.manual_seed(2)
        x = torch.randn(8, 12, 16)
        y = x.roll(1, 1).sign()
        return ps.Task(
            model=nn.Sequential(Attention(offset), nn.Linear(16, 16)),
            loss=lambda m, b: F.soft_margin_loss(m(b[0]).float(), b[1]),
            batches=lambda step: (x + 0.01 * step, y),
        )

    task = make()
    exact = gradients_of(task, PrecisionPlan.uniform("fp32"))
    errors = {
        word: relative(gradients_of(task, plan)["0.qkv.weight"], exact["0.qkv.weight"])
        for word, plan in (("autocast", PrecisionPlan.uniform("bf16")), ("cast", cast_everywhere()))
    }
    assert errors["autocast"] < 0.1 and (errors["cast"] < 0.1) == held
    plan = recommended(make, tmp_path / "run")
    assert plan.status == "confirmed"
    if held:
        assert plan.made_from["beyond_autocast"]["taken"]
    assert relative(gradients_of(task, plan)["0.qkv.weight"], exact["0.qkv.weight"]) < 0.15


def gradients_of(task, plan):
    with ps.apply(plan, task.model) as handle:
        with handle.autocast():
            loss = task.loss(task.model, task.batch(0))
        loss.backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    return found


def relative(got, exact):
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.arange(12)[None] % 5 > 0},
        {"attn_mask": torch.linspace(-3, 3, 144).view(12, 12)},
        {"attn_mask": torch.ones(12, 12, dtype=torch.bool).tril(-1)},  # the first row sees nothing
        {"enable_gqa": True},
    ],
)
def test_attend_is_attention(options):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in options else 4
    tensors = [torch.randn(2, h, 12, 8, requires_grad=True) for h in (4, heads, heads)]
    results = []
    for function in (F.scaled_dot_product_attention, attend):
        y = function(*tensors, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attend_rounds_every_step_to_bf16():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8).to(BF16) for _ in range(3))
    logits = (q * 8**-0.5) @ k.mT
    assert logits.dtype is BF16 and torch.equal(attend(q, k, v), logits.softmax(-1) @ v)


def test_attend_drops_what_it_is_asked_to_and_leaves_the_rest_to_pytorch():
    q = torch.ones(1, 64, 4, dtype=BF16)
    torch.manual_seed(0)
    dropped = attend(q, q, q, dropout_p=0.5).float()
    assert dropped.std() > 0.05 and float(dropped.mean()) == pytest.approx(1.0, abs=0.1)
    now = Now()
    now.attention = True
    long = torch.randn(1, MOST_KEYS + 1, 4).to(BF16)
    for tensors, options in (([long] * 3, {}), ([q.float()] * 3, {}), ([q] * 3, {})):
        expected = F.scaled_dot_product_attention(*tensors, **options)
        with LowAttention(now):
            got = F.scaled_dot_product_attention(*tensors, **options)
        own = attend(*tensors)
        assert torch.equal(got, own if tensors[0] is q else expected)
    with LowAttention(now), pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(q, q, q, torch.ones(64, 64, dtype=torch.bool), 0.0, True)


@pytest.mark.parametrize(
    ("layer", "low"),
    [(CAST, True), (LayerPrecision("bf16", policy="cast"), False), (LayerPrecision("bf16"), False)],
)
def test_only_cast_regions_over_fp32_masters_have_bf16_softmax(layer, low):
    """A model that is bf16 as a whole (.bfloat16()) and autocast keep PyTorch's attention, inside a cast region too."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(0.0), nn.Linear(16, 16))
    x = torch.randn(2, 8, 16)
    plan = PrecisionPlan(default=CAST, modules={"0": layer})
    seen = []

    class Softmaxes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with ps.apply(plan, model), Softmaxes():
        model(x)
    assert ("aten::_softmax" in seen) == low


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.attention, self.last, self.on = Attention(0.0), nn.TransformerEncoderLayer(16, 2, 32, 0.0), on

    def forward(self, x):
        return self.last(checkpoint(self.attention, x, use_reentrant=False) if self.on else self.attention(x))


def test_recomputed_attention_and_torchs_own_transformer_give_the_same():
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model, x = Checkpointed(on), torch.randn(2, 8, 16)
        with ps.apply(cast_everywhere(), model):
            model(x).float().square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(*found, strict=True))


# casts of the masters


def test_low_copies_follow_every_change_of_the_masters():
    """Nothing is kept between two forward passes, so that edits through .data, which no counter sees, count as well."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def by_hand():
        low = {k: v.to(BF16) for k, v in model.state_dict().items()}
        y = F.linear(x.to(BF16), low["0.weight"], low["0.bias"])
        return F.layer_norm(y, (8,), low["1.weight"], low["1.bias"])

    with ps.apply(cast_everywhere(), model):

        def step():
            model(x).square().sum().backward()
            assert all(p.grad.dtype is torch.float32 for p in model.parameters())
            optimizer.step()

        def edit():
            model[0].weight.data.mul_(1.5)

        def replace():
            model[0].weight.data = torch.randn(8, 8)

        def load():
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})

        for change in (step, edit, replace, load):
            before = model(x)
            change()
            after = model(x)
            assert torch.equal(after, by_hand()) and not torch.equal(after, before)
            with torch.no_grad():
                assert torch.equal(model(x), after)


class Tied(nn.Module):
    """Reads the table of its embedding itself, in a method that forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.logits(self.norm(self.table(x)))

    def logits(self, h):
        return h @ self.table.weight.T


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 12)

    def forward(self, x):
        return self.last(self.table(x))


@pytest.mark.parametrize("make", [Tied, Plain])
def test_rows_of_a_table_are_cast_as_the_table_would_be(make):
    torch.manual_seed(0)
    model, x = make(), torch.randint(12, (3, 50))
    table = model.table.weight
    with ps.apply(cast_everywhere(), model):
        seen = []
        model.table.register_forward_hook(lambda m, args, out: seen.append((m.weight.dtype, out)))
        y = model(x)
        y.float().square().sum().backward()
    dtype, rows = seen[0]
    assert torch.equal(rows, F.embedding(x, table.to(BF16)))
    assert y.dtype is BF16 and table.grad.dtype is torch.float32
    assert dtype is (BF16 if make is Tied else torch.float32)  # what its own code sees
    assert model.table.weight is table


def test_gradients_of_a_frequent_row_add_up_in_fp32():
    """4096 gradients of 1: bf16 would stop at 256."""
    model = nn.Sequential(nn.Embedding(2, 4))
    with ps.apply(cast_everywhere(), model):
        model(torch.zeros(4096, dtype=torch.long)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.tensor([[4096.0] * 4, [0.0] * 4]))


def test_a_cast_gpt_compiles_whole_and_gives_the_same(monkeypatch):
    torch.compiler.reset()
    task = gpt(size="tiny")
    batch = task.batch(0)
    with ps.apply(cast_everywhere(), task.model) as handle:
        with handle.autocast():
            expected = task.loss(task.model, batch)
        compiled = torch.compile(task.model, backend="eager", fullgraph=True)
        with handle.autocast():
            got = task.loss(compiled, batch)
    assert torch.equal(got, expected) and got.dtype is torch.float32
    torch.compiler.reset()
