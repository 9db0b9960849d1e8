"""An autocast that casts nothing, so that model code that asks for autocast, or switches it off, finds what it expects.

Under policy "autocast" the lists decide, but code can step outside them: `with torch.autocast("cuda", enabled=False)`
around rotary positions, `if torch.is_autocast_enabled()`. Real autocast to float32 is on while emulating: it leaves
float32 tensors as they are, and says through `torch.is_autocast_enabled` whether the lists apply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def marked(device: str) -> Iterator[None]:
    """Autocast to float32 is on for `device` inside; nothing changes where autocast is on already."""
    if torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.float32)
    try:
        with _accepted():
            yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, dtype)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _accepted() -> Iterator[None]:
    """torch.autocast takes float32 inside: checkpointing enters it again, with the dtype that it found, to recompute.
    Otherwise it warns of that dtype, and switches autocast off."""
    kind = torch.amp.autocast_mode.autocast
    original = kind.__init__

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        wide = enabled and (dtype or torch.get_autocast_dtype(device_type)) is torch.float32
        original(self, device_type, torch.bfloat16 if wide else dtype, enabled, cache_enabled)
        if wide:
            self.fast_dtype = torch.float32

    kind.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__init__ = original  # type: ignore[method-assign]
