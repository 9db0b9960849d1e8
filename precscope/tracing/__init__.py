"""The tracer: which op made the first inf or NaN, where, and why.

    with ps.trace(model) as t:
        (loss(model, batch) * 65536).backward()
    print(t.first_nonfinite)               # None, or module, op, phase, line, ranges and the likely cause

tracer.py watches the ops; reading.py reads tensors; causes.py says the likely cause in words; finding.py is the record.
"""

from .finding import Finding, TensorRange
from .tracer import Tracer, trace

__all__ = ["Finding", "TensorRange", "Tracer", "trace"]
