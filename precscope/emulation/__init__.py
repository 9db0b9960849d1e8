"""Low precision op by op, on any device and for any format: `with ps.emulate(model, "fp16"): ...`.

emulator.py is the context manager; mode.py rounds what ops take and give, marks.py knows what is rounded already,
casts.py and marker.py follow the casts and autocast blocks of the user's code, autocast.py has PyTorch's autocast
lists, facts.py what an op's schema says.
"""

from .autocast import entry_of, lists
from .emulator import Emulation, emulate

__all__ = ["Emulation", "emulate", "entry_of", "lists"]
