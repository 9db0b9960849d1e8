"""Compiled code runs no hooks: while any recorder watches, torch.compile'd functions run eagerly."""

from __future__ import annotations

import sys
from typing import Any

import torch


class ForcedEager:
    """Counts the recorders that watch; the stance that was set before the first is put back after the last."""

    _watching = 0
    _stance: Any = None

    def __init__(self) -> None:
        self._held = False

    def hold(self) -> None:
        """Run compiled code eagerly from now on, where anything was compiled at all."""
        if self._held or "torch._dynamo" not in sys.modules:
            return
        self._held = True
        if ForcedEager._watching == 0:
            ForcedEager._stance = torch.compiler.set_stance("force_eager")
        ForcedEager._watching += 1

    def release(self) -> None:
        """This recorder watches no more."""
        if not self._held:
            return
        self._held = False
        ForcedEager._watching -= 1
        if ForcedEager._watching == 0:
            ForcedEager._stance.__exit__(None, None, None)
            ForcedEager._stance = None
