"""ps.export: a model with its plan as one file that runs without precscope.

    ps.export(plan, model, (x,), out="model.pt2")        # torch.export.load("model.pt2").module()(x)
    ps.export(plan, model, (x,), out="model.onnx")       # onnxruntime, TensorRT, ...

The file holds the graph with the plan's casts in it, and the weights as the plan stores them. It is run on the example
inputs before it is given its name: a .pt2 must return what the planned model returns, bit for bit on a CPU; an .onnx
must agree within the rounding that the plan's formats explain.

    program.py      the planned model through torch.export
    onnxfile.py     from there to ONNX
    result.py       Exported
    writing.py      ps.export, and the check of what was written
"""

from __future__ import annotations

from .result import Exported
from .writing import export

__all__ = ["Exported", "export"]
