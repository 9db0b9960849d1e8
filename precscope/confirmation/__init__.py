"""Advice that was tried on the model itself.

substitution.py runs chosen modules low and the rest fp32; probe.py makes one pass and takes loss, gradients and output;
judgement.py compares with fp32; search.py finds what must stay high; explanation.py says which op; trial.py trains a
few steps; states.py and ground.py hold what is tried and where; session.py and recommending.py put them together.
"""

from .recommending import recommend
from .tolerance import Tolerance

__all__ = ["Tolerance", "recommend"]
