"""Tasks, their batches by step number, and loading them."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from precscope.errors import TaskError
from precscope.tasks import Task, load_task, make_task


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def make(**changes) -> Task:
    parts = {"model": nn.Linear(3, 2), "loss": loss, "batches": [torch.ones(4, 3)], **changes}
    return Task(**parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda x: x}, r"Task\(model=...\) must be a torch.nn.Module, not function"),
        ({"loss": 3}, r"Task\(loss=...\) must be a function \(model, batch\), not int 3"),
        ({"after_step": "ema"}, r"Task\(after_step=...\) must be a function \(model, step\), not str 'ema'"),
        (
            {"optimizer": "adam"},
            r"Task\(optimizer=...\) must be None, a torch optimizer or a function .* not str 'adam'",
        ),
        ({"batches": []}, r"Task\(batches=...\) is empty; give a list of batches"),
        ({"batches": torch.ones(3)}, r"must be a list of batches, .* or a function step -> batch, not Tensor"),
        ({"batches": None}, r"Task\(batches=...\) must be a list of batches, .*, not None"),
        ({"batches": {"x": 1}}, r"Task\(batches=...\) must be .*, not dict"),
        ({"eval_batches": 7}, r"Task\(eval_batches=...\) must be .*, not int 7"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused_in_one_line(changes, message):
    with pytest.raises(TaskError, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda m, b: m(b).square().mean().item(), r"must return a scalar tensor, not float .* \(drop .item\(\)\)"),
        (lambda m, b: m(b), r"must return a scalar tensor, not one of shape \(4, 2\): reduce it"),
        (lambda m, b: None, r"must return a scalar tensor, not None"),
        (lambda m, b: m(b).argmax(), r"floating-point tensor, not one of dtype torch.int64"),
        (lambda m, b: m(b).mean().detach(), r"the loss has no gradient"),
    ],
)
def test_what_the_loss_returns_is_checked(returned, message):
    task = make(loss=returned)
    with pytest.raises(TaskError, match=message):
        task.checked_loss(task.batch(0))


def test_a_loss_of_one_element_is_a_scalar():
    assert make(loss=lambda m, b: loss(m, b).reshape(1)).checked_loss(torch.ones(4, 3)).shape == ()


def test_a_list_is_cycled_and_a_function_called_with_the_step():
    assert [make(batches=["a", "b", "c"]).batch(i) for i in (0, 4, 5, 1)] == ["a", "b", "c", "b"]
    assert make(batches=lambda step: step * step).batch(7) == 49


class Noisy(Dataset):
    """Items that draw from all three global generators, as augmentation does."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, float(torch.rand(())), np.random.rand(), random.random()])


def noisy_loader(seed: int = 0) -> Task:
    return make(batches=DataLoader(Noisy(), batch_size=4, shuffle=True), seed=seed)


def test_batches_of_a_shuffling_augmenting_loader_depend_on_step_and_seed_alone():
    straight = noisy_loader()
    expected = [straight.batch(i) for i in range(9)]  # three epochs of 4, 4, 2
    assert [len(b) for b in expected] == [4, 4, 2] * 3
    torch.rand(100), random.random(), np.random.rand()  # what a model would draw in between
    jumping = noisy_loader()
    for step in (5, 6, 6, 2, 8, 0):
        torch.testing.assert_close(jumping.batch(step), expected[step], rtol=0, atol=0)
    assert not torch.equal(expected[0], expected[3]), "another epoch, another order"
    assert not torch.equal(noisy_loader(seed=1).batch(0), expected[0])


def test_reading_batches_leaves_the_global_generators_alone():
    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), np.random.rand()]

    task = noisy_loader()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = draws()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    task.batch(0), task.batch(4)
    assert draws() == expected


def test_a_generator_is_read_once_and_its_end_explained():
    task = make(batches=(torch.full((4, 3), float(i)) for i in range(3)))
    assert [float(task.batch(i)[0, 0]) for i in range(3)] == [0, 1, 2]
    with pytest.raises(TaskError, match=r"a generator and ran out after 3 batches; it cannot be started again"):
        task.batch(3)
    with pytest.raises(TaskError, match="cannot go back to batch 0"):
        task.batch(0)


def test_a_loader_shorter_than_one_batch_is_explained():
    loader = DataLoader(TensorDataset(torch.ones(3, 3)), batch_size=4, drop_last=True)
    with pytest.raises(TaskError, match=r"Task\(batches=...\) is empty"):
        make(batches=loader)

    class Nothing:
        def __iter__(self):
            return iter(())

    with pytest.raises(TaskError, match="the iterable gave no batch; is the data set shorter than one batch"):
        make(batches=Nothing()).batch(0)


def test_evaluation_reads_lists_loaders_and_functions():
    assert list(make(eval_batches=[1, 2, 3]).evaluation(limit=2)) == [1, 2]
    assert list(make(eval_batches=lambda step: step).evaluation()) == list(range(8))
    assert list(make().evaluation()) == []


# loading


SOURCE = """
import torch
from torch import nn
import helper_of_task
import precscope as ps

def make():
    return ps.Task(model=nn.Linear(3, 2), loss=lambda m, b: m(b).mean(), batches=[torch.ones(1, 3)])

def seeded(seed=0):
    task = make()
    task.name = f"seeded-{seed}"
    return task

def wrong():
    return nn.Linear(3, 2)

def broken():
    raise KeyError("no such data\\nsecond line")

number = 3
"""


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "helper_of_task.py").write_text("x = 1\n")
    path = tmp_path / "my_task.py"
    path.write_text(SOURCE)
    return path


def test_a_task_comes_from_a_file_that_imports_its_neighbour(task_file):
    task = make_task(f"{task_file}:make")
    assert isinstance(task, Task)
    assert task.name == f"{task_file}:make"
    assert isinstance(task.factory(), Task) and task.factory() is not task


def test_two_makings_start_equal_and_another_seed_does_not(task_file):
    reference = load_task(f"{task_file}:make")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = reference.make(), reference.make(), reference.make(seed=1)
    assert torch.equal(first.model.weight, second.model.weight)
    assert not torch.equal(first.model.weight, other.model.weight)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    assert load_task(f"{task_file}:seeded").make(seed=4).name == "seeded-4"


def test_a_task_comes_from_a_module_of_the_working_directory(task_file, monkeypatch):
    monkeypatch.chdir(task_file.parent)
    assert isinstance(make_task("my_task:make"), Task)
    del sys.modules["my_task"]


def test_a_function_is_its_own_reference():
    assert isinstance(make_task(make), Task)
    assert isinstance(make_task(partial(make, name="x")), Task)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{dir}/my_tsk.py:make", r"no file .*my_tsk.py \(did you mean .*my_task.py\?\)"),
        ("{dir}/my_task.py:maek", r"my_task.py has no function 'maek'; it has make"),
        ("{dir}/my_task.py:number", r"is int 3, not a function that returns a precscope.Task"),
        ("{dir}/my_task.py:wrong", r"my_task.py:wrong must return a precscope.Task, not Linear"),
        ("{dir}/my_task.py:broken", r"my_task.py:broken raised KeyError: .*no such data"),
        (
            "no_such_module_here:make",
            r"cannot import the module 'no_such_module_here'; for a file write path/to/no_such",
        ),
        ("gtp", r"cannot read the task 'gtp' \(did you mean gpt\?\)"),
        ("", r"give path/to/file.py:function, module:function, or a bundled task \(gpt"),
    ],
)
def test_what_cannot_be_loaded_is_explained_in_one_line(reference, message, task_file):
    with pytest.raises(TaskError, match=message) as caught:
        make_task(reference.format(dir=task_file.parent))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_fails_on_import_keeps_the_cause(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(TaskError, match=r"bad.py raised ModuleNotFoundError on import: No module named") as caught:
        load_task(f"{tmp_path}/bad.py:make")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_module_is_light():
    code = "import sys, precscope.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
