"""Low precision op by op, on any device and for any format: `with ps.emulate(model, "fp16"): ...`.

emulator.py is the context manager; mode.py rounds what ops take and give, marks.py knows what is rounded already,
casts.py and marker.py follow the casts and autocast blocks of the user's code, autocast.py has PyTorch's autocast
lists, facts.py what an op's schema says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .autocast import entry_of, lists

if TYPE_CHECKING:
    from .emulator import Emulation, emulate

__all__ = ["Emulation", "emulate", "entry_of", "lists"]


def __getattr__(name: str) -> Any:
    """The lists are data, for advice without torch; the emulator is loaded when it is asked for."""
    if name in ("Emulation", "emulate"):
        from . import emulator

        return getattr(emulator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
