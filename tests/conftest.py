"""Shared fixtures: every test must leave torch as it found it, and tests of the CLI call the real entry."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No module hook, no replaced forward and no dispatch mode may outlive a test."""
    yield
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None, "a dispatch mode was left on"
    assert not torch.is_autocast_enabled("cpu"), "autocast was left on"
    assert not torch.nn.modules.module._global_forward_hooks, "a global forward hook was left behind"
    left = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module) and any(_is_ours(h) for h in _hooks(m))]
    assert not left, f"hooks left on {[type(m).__name__ for m in left][:3]}"


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
