"""ps.infer: what a plan does to a model that is only run, batch by batch beside fp32.

    result = ps.infer(task, plan=plan)
    print(result)

Both run on the same weights and the same held-out batches, in evaluation mode and without gradients; what is random in
the model draws the same numbers in both. The model is then as it was, bit for bit.

    calls.py        how the model is called on a batch
    differences.py  outputs compared: relative error, SQNR, non-finite values
    running.py      the run itself
    answers.py      whether the answer stays the same: classes, tokens, signs
    measuring.py    latency in turns, memory
    result.py       InferResult, its table and its file
"""

from __future__ import annotations

from .result import Answer, InferResult, Latency, Loss, Memory, OutputDifference
from .running import infer

__all__ = ["Answer", "InferResult", "Latency", "Loss", "Memory", "OutputDifference", "infer"]
