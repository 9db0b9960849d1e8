"""Automatic choice of format, loss scale and gradient accumulation from a short profile: `ps.tune("gpt", steps=50)`.

tuner.py is the order of things; candidates.py trains each precision for some steps and takes time and memory;
sums.py adds up real gradients in the formats they could be stored in; scaling.py reads the loss scale off recorded
gradients; result.py is what comes out, and its file.
"""

from .candidates import Candidate
from .result import Tuning, load_settings, settings_path
from .sums import Sums
from .tuner import tune

__all__ = ["Candidate", "Sums", "Tuning", "load_settings", "settings_path", "tune"]
