"""Shared fixtures: every test must leave torch as it found it, and tests of the CLI call the real entry."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")


_made: weakref.WeakSet = weakref.WeakSet()
_init = torch.nn.Module.__init__


def _remember(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    _made.add(self)


torch.nn.Module.__init__ = _remember
_autocast = (torch.autocast.__init__, torch.autocast.__enter__, torch.autocast.__exit__)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """What is there before a file's tests need not be looked through again: each run of the trainer collects garbage
    first, 0.3 s for torch's modules alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No module hook, no replaced forward, no dispatch mode, no autocast and no change to it may outlive a test."""
    before = _switches()
    yield
    assert _switches() == before, "threads or a numerical switch of torch were left changed"
    now = (torch.autocast.__init__, torch.autocast.__enter__, torch.autocast.__exit__)
    assert now == _autocast, "torch.autocast was left changed"
    assert _get_current_dispatch_mode() is None, "a dispatch mode was left on"
    assert not torch.is_autocast_enabled("cpu"), "autocast was left on"
    assert not torch.nn.modules.module._global_forward_hooks, "a global forward hook was left behind"
    left = [type(m).__name__ for m in list(_made) if any(_is_ours(h) for h in _hooks(m))]
    assert not left, f"hooks left on {left[:3]}"
    hooked = [n for m in list(_made) for n, p in m._parameters.items() if p is not None and p._backward_hooks]
    assert not hooked, f"gradient hooks left on {hooked[:3]}"


def _switches() -> list:
    """What changes the numbers that torch computes, in this process from now on."""
    return [
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(getattr(torch.backends.mkldnn, name).fp32_precision for name in ("matmul", "conv", "rnn")),
        (torch.full((64,), 1e-30) * 1e-10)[0].item() > 0,  # denormal numbers are there
    ]


def _hooks(module):
    forward = module.__dict__.get("forward")
    return [
        *module.__dict__.get("_forward_hooks", {}).values(),
        *module.__dict__.get("_forward_pre_hooks", {}).values(),
        *([forward] if forward is not None else []),
    ]


def _is_ours(hook) -> bool:
    return getattr(hook, "__module__", "").startswith("precscope.")


@pytest.fixture
def precscope_cli(tmp_path):
    """Run the console entry in a process of its own, in `tmp_path`; returns the CompletedProcess."""

    def run(*arguments: object, **kwargs):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "COLUMNS": "80",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, "-m", "precscope", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=kwargs.pop("cwd", tmp_path),
            env=environment,
            timeout=200,
            **kwargs,
        )

    return run


def pytest_sessionfinish() -> None:
    """What was frozen is to be freed as usual; libraries with C++ bindings would report a leak."""
    gc.unfreeze()
