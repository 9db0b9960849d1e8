"""Runs side by side: `ps.compare(["runs/fp32", "runs/plan"], seeds=5)`, and `ps.verify("runs/plan")`.

runs.py reads run directories; pairing.py sets one run against the baseline; equivalence.py has the intervals and tests,
wording.py what is said of them; curves.py the loss curves over seeds; seeds.py trains what is missing; comparing.py and
verifying.py are what users call; result.py what they get.
"""

from .comparing import compare
from .curves import CurvePoint
from .equivalence import Difference, Ratio
from .pairing import Against
from .result import Comparison, RunRow
from .verifying import verify

__all__ = ["Against", "Comparison", "CurvePoint", "Difference", "Ratio", "RunRow", "compare", "verify"]
