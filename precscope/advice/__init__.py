"""Advice: which format each module can bear, what it costs, and the assignment that follows.

units.py reads the recorded graph; constraints.py and loss_scale.py say what ranges forbid; cost.py measures or models
time; solve.py is the linear program; recommender.py puts them together and gives the reasons.
"""

from .constraints import Limits
from .measured import Measured
from .recommender import recommend

__all__ = ["Limits", "Measured", "recommend"]
