"""Advice that was tried on the model itself.

substitution.py runs chosen modules low and the rest fp32; probe.py makes one pass and takes loss, gradients and output;
judgement.py compares with fp32; search.py finds what must stay high; trial.py trains a few steps; states.py moves
between the model as it stands and as it will be after them; recommending.py puts them together as `ps.recommend`.
"""

from .recommending import recommend
from .tolerance import Tolerance

__all__ = ["Tolerance", "recommend"]
