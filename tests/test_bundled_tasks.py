"""Bundled tasks: each makes batches, trains in every precision and starts equal from its seed; sizes in references."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import precscope as ps
from precscope import bundled
from precscope.errors import TaskError, UsageError
from precscope.tasks import load_task, make_task, sized, split_size

LIGHT = ("gpt", "resnet", "moe", "diffusion", "towers")
HEAVY = ("text", "speech", "smollm2")
EVERY = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]


def made(name: str, size: str = "tiny", seed: int = 0) -> ps.Task:
    """The task, or skip, naming what is not installed."""
    lacking = bundled.TASKS[name].missing()
    if lacking:
        pytest.skip(f"{name} needs {', '.join(lacking)}")
    return make_task(f"{name}@{size}", seed=seed)


def test_the_list_and_the_tests_know_the_same_tasks():
    assert set(bundled.TASKS) == {*LIGHT, *HEAVY}
    assert all(tuple(info.sizes) == bundled.SIZES for info in bundled.TASKS.values())


@pytest.mark.filterwarnings("ignore:.*swigvarlink:DeprecationWarning")
@pytest.mark.parametrize("name", EVERY)
def test_every_task_trains_in_every_precision_and_is_the_same_again_from_its_seed(name):
    first = {}
    for precision in ("fp32", "bf16", "fp16"):
        task = made(name)
        losses = ps.train(task, steps=3, precision=precision, eval_limit=1).losses
        assert len(losses) == 3 and all(map(math.isfinite, losses)), precision
        first[precision] = losses[0]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.03)
    assert first["fp16"] == pytest.approx(first["fp32"], rel=0.03)
    again = ps.train(made(name), steps=1, precision="fp32", eval_limit=1)
    assert again.losses[0] == first["fp32"]
    assert math.isfinite(again.eval_loss)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_follows_from_seed_and_step_alone(name):
    one, other, seeded = made(name), made(name), made(name, seed=1)
    torch.rand(3)
    for ours, theirs in zip(_tensors(one.batch(5)), _tensors(other.batch(5)), strict=True):
        assert torch.equal(ours, theirs)
    assert not all(map(torch.equal, _tensors(one.batch(5)), _tensors(one.batch(6))))
    assert not all(map(torch.equal, _tensors(one.batch(5)), _tensors(seeded.batch(5))))
    for (name_a, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name_a
    assert next(one.evaluation()) is not None


@pytest.mark.parametrize("name", EVERY)
def test_the_list_says_how_many_parameters_the_small_size_has(name):
    model = made(name, "small").model
    assert sum(p.numel() for p in model.parameters()) == bundled.TASKS[name].parameters


@pytest.mark.parametrize("name", ["resnet", "moe", "diffusion", "towers", "gpt"])
@pytest.mark.parametrize("size", ["medium", "large"])
def test_the_larger_sizes_take_their_batches(name, size):
    lacking = bundled.TASKS[name].missing()
    if lacking:
        pytest.skip(f"{name} needs {', '.join(lacking)}")
    with torch.device("meta"):
        module = sys.modules[load_task(name).function.__module__]
        config = module.SIZES[size]
        kinds = {"resnet": "ResNet", "moe": "MoEGPT", "diffusion": "UNet", "towers": "TwoTowers", "gpt": "GPT"}
        kind = getattr(module, kinds[name])
        given = {"resnet": ("width", "depth"), "diffusion": ("width",)}.get(name)
        model = kind(*(getattr(config, g) for g in given)) if given else kind(config)
        count = sum(p.numel() for p in model.parameters())
        edge = getattr(config, "edge", 0)
        inputs = {
            "resnet": lambda: (torch.zeros(2, 1, edge, edge),),
            "diffusion": lambda: (torch.zeros(2, 1, edge, edge), torch.zeros(2, dtype=torch.int64)),
            "towers": lambda: (torch.zeros(2, 1, edge, edge), torch.zeros(2, 40, dtype=torch.int64)),
        }.get(name, lambda: (torch.zeros(1, config.context, dtype=torch.int64),))()
        model(*inputs)
    assert count > 4 * bundled.TASKS[name].parameters


def _tensors(batch) -> list[torch.Tensor]:
    return [batch] if isinstance(batch, torch.Tensor) else list(batch)


# sizes in references


def test_a_size_is_part_of_the_reference_and_of_the_run(tmp_path):
    assert split_size("gpt@large") == ("gpt", "large")
    assert split_size("/home/me@work/my_task.py:make") == ("/home/me@work/my_task.py:make", None)
    assert sized("gpt", None) == "gpt" and sized("gpt", "tiny") == sized("gpt@tiny", "tiny") == "gpt@tiny"
    with pytest.raises(UsageError, match="gpt@tiny names the size tiny, and --size says small: give one of them"):
        sized("gpt@tiny", "small")
    result = ps.train("gpt@tiny", steps=1, out=tmp_path / "run")
    assert ps.train(task := make_task("gpt@tiny"), steps=1).losses == result.losses
    assert task.reference == "gpt@tiny"
    assert '"task_ref": "gpt@tiny"' in (tmp_path / "run" / "run.json").read_text()


def test_a_size_goes_to_functions_of_users_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "sized_task.py"
    path.write_text(
        "import torch, precscope as ps\n"
        "def make(size='4'):\n"
        "    return ps.Task(model=torch.nn.Linear(int(size), 1), loss=lambda m, b: m(b).mean(),\n"
        "                   batches=[torch.ones(2, int(size))])\n"
        "def plain():\n"
        "    return make()\n"
    )
    assert make_task(f"{path}:make@6").model.in_features == 6
    assert make_task(f"{path}:make").model.in_features == 4
    with pytest.raises(TaskError, match=r"plain@6: the function takes no parameter `size`; leave out the size, or"):
        make_task(f"{path}:plain@6")


def test_unknown_sizes_and_names_are_refused_with_what_there_is():
    with pytest.raises(UsageError, match=r"gpt has no size 'smal' \(did you mean small\?\); sizes: tiny, small, me"):
        make_task("gpt@smal")
    with pytest.raises(TaskError, match=r"cannot read the task 'resnt@tiny' \(did you mean resnet"):
        make_task("resnt@tiny")
    with pytest.raises(UsageError, match=r"no bundled task 'speach' \(did you mean speech\?\); tasks: gpt, text"):
        bundled.task_info("speach")


# micro-batches


def test_the_task_says_how_many_micro_batches_where_nobody_else_does(tmp_path):
    def task(**more) -> ps.Task:
        torch.manual_seed(0)
        batches = [torch.full((2, 3), float(i)) for i in range(1, 9)]
        return ps.Task(model=torch.nn.Linear(3, 1), loss=lambda m, b: m(b).square().mean(), batches=batches, **more)

    own = ps.train(task(accumulate=2), steps=2, out=tmp_path / "own")
    said = ps.train(task(), steps=2, accumulate=2)
    assert own.losses == said.losses
    assert ps.train(task(accumulate=2), steps=2, accumulate=1).losses == ps.train(task(), steps=2).losses
    assert '"accumulate": 2' in (tmp_path / "own" / "run.json").read_text()
    with pytest.raises(TaskError, match=r"Task\(accumulate=...\) must be an integer of at least 1, not int 0"):
        task(accumulate=0)


# the command


def test_the_list_is_light_fits_eighty_columns_and_names_every_task(precscope_cli):
    done = precscope_cli("tasks")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in bundled.TASKS:
        assert f"\n{name} " in done.stdout
    assert "gpt        byte GPT                         3.36 M" in done.stdout
    assert done.stdout.splitlines()[-1] == "next: precscope tasks text"
    code = "import sys\nfrom precscope.cli.tasks import tasks\ntasks(None, False)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_one_task_is_described_with_sizes_and_needs(precscope_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PRECSCOPE_CACHE", str(tmp_path))
    monkeypatch.delenv("PRECSCOPE_SPEECH", raising=False)
    done = precscope_cli("tasks", "speech")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "speech with transcripts  precscope tasks speech --fetch (1.8 MB)" in done.stdout
    assert "medium  8 clips of 30 s" in done.stdout
    assert done.stdout.splitlines()[-1] == "next: precscope tasks speech --fetch"
    wrong = precscope_cli("tasks", "gpt", "--fetch")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: gpt needs no data but what its packages hold: leave out --fetch\n"


def test_size_on_the_command_line_is_kept_for_the_commands_that_follow(precscope_cli):
    done = precscope_cli("train", "gpt", "--size", "tiny", "--steps", 2, "--out", "runs/a", "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    assert "next: precscope train gpt@tiny --precision fp32 --steps 2 --out runs/fp32" in done.stdout
    wrong = precscope_cli("recommend", "runs/a", "--size", "tiny")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --size tiny is of the task: give --task, too\n")


# accuracy


def test_accuracy_counts_what_is_right_and_refuses_what_is_not_classified():
    from precscope.training.tasks import accuracy, majority

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def forward(self, x):
            assert not self.training
            return x @ self.weight

    inputs = torch.eye(3)[[0, 1, 2, 2]]
    batches = [(inputs, torch.tensor([0, 1, 2, 1])), (inputs[:2], torch.tensor([1, 1]))]
    task = ps.Task(model=Fixed(), loss=lambda m, b: m(b[0]).mean(), batches=batches, eval_batches=batches,
                   forward=lambda m, b: m(b[0]))  # fmt: skip
    assert accuracy(task.model, task) == pytest.approx(4 / 6)
    assert accuracy(task.model, task, limit=1) == pytest.approx(3 / 4)
    assert majority(task) == pytest.approx(4 / 6)
    assert task.model.training, "the mode is put back"
    with pytest.raises(TaskError, match="gpt-tiny does not sort into classes: accuracy needs batches that end with"):
        gpt = make_task("gpt@tiny")
        accuracy(gpt.model, gpt)


def test_resnet_and_towers_learn_in_sixty_steps():
    from precscope.training.tasks import accuracy

    resnet = made("resnet", "small")
    ps.train(resnet, steps=60, lr=2e-3)
    assert accuracy(resnet.model, resnet) > 0.85
    towers = made("towers", "small")
    assert accuracy(towers.model, towers) < 0.15, "one of twenty captions"
    ps.train(towers, steps=60)
    assert accuracy(towers.model, towers) > 0.3


@pytest.mark.slow
def test_text_rises_above_the_majority_class():
    from precscope.training.tasks import accuracy, majority

    task = made("text", "small")
    assert 0.45 < majority(task) < 0.6
    ps.train(task, steps=40, precision="bf16", eval_limit=1)
    assert accuracy(task.model, task, limit=12) > 0.68


# moe


def test_experts_get_each_token_that_they_have_room_for():
    from precscope.training.tasks.moe import _slots

    numbers = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])  # of 4 tokens, two choices each
    slots = _slots(numbers, experts=3, capacity=2)
    assert slots.tolist() == [[0, 3], [1, 4], [6, 6], [2, 6]], "third first choice of 0, and what comes after, is over"


def test_a_mixture_with_room_for_all_is_the_sum_over_chosen_experts():
    from precscope.training.tasks.moe import MixtureOfExperts, MoEConfig

    torch.manual_seed(0)
    config = MoEConfig(width=8, experts=4, chosen=2, spare=4.0, heads=1)
    layer = MixtureOfExperts(config)
    torch.nn.init.normal_(layer.experts.down)
    x = torch.randn(2, 5, 8)
    y, balance = layer(x)
    shares = layer.router(x).softmax(-1)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            gates, chosen = shares[b, t].topk(2)
            for gate, expert in zip(gates / gates.sum(), chosen, strict=True):
                hidden = torch.nn.functional.gelu(x[b, t] @ layer.experts.up[expert])
                expected[b, t] += gate * (hidden @ layer.experts.down[expert])
    torch.testing.assert_close(y, expected)
    used = torch.nn.functional.one_hot(shares.argmax(-1).flatten(), 4).float().mean(0)
    torch.testing.assert_close(balance, 4 * (used * shares.flatten(0, 1).mean(0)).sum())


@pytest.mark.slow
def test_the_speech_weights_understand_what_is_said():
    task = made("speech", "small")
    batch = task.eval_batches[-1]  # the reading; of the cards it writes numbers in digits
    task.model.eval()
    with torch.no_grad():
        said = task.forward(task.model, batch).argmax(-1)
        losses = [float(task.loss(task.model, b)) for b in task.eval_batches]
    assert max(losses) < 1.5, "random weights give 10.9"
    spoken = batch[1][0, 1:]
    assert (said[0] == spoken)[spoken >= 0].float().mean() > 0.7


def test_captions_differ_by_kind_and_fit():
    from precscope.training.tasks.towers import caption

    for way in range(8):
        rows = torch.stack([caption(kind, way) for kind in range(20)])
        assert rows.shape == (20, 40) and len(rows.unique(dim=0)) == 20 and bool((rows[:, -1] == 0).all())
    assert bytes(caption(15, 0).tolist()).rstrip(b"\0") == b"a bold seven"


def test_noise_is_taken_off_what_the_batch_says():
    pytest.importorskip("sklearn")
    from precscope.training.tasks.diffusion import signal_share

    task = made("diffusion")
    noisy, times, noise = task.batch(3)
    share = signal_share(times)[:, None, None, None]
    clean = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    assert clean[times < 700].abs().max() <= 1.001
    assert signal_share(torch.tensor([0, 500, 999])).tolist() == pytest.approx([0.99994, 0.49, 0.0], abs=0.02)
