"""The bundled trainer: `train(task, plan=plan, steps=500, out="runs/b")`.

loop.py is the loop; precision.py how precision enters it; config.py its settings; log.py and checkpoint.py its files;
result.py what it returns; tasks/ the tasks that come with precscope.
"""

from .compiling import CompileConfig
from .config import TrainConfig
from .entry import train
from .evaluation import evaluate
from .loop import Trainer
from .precision import Autocast, FullPrecision, Planned, Precision, make_precision
from .result import TrainResult

__all__ = [
    "Autocast",
    "CompileConfig",
    "FullPrecision",
    "Planned",
    "Precision",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "evaluate",
    "make_precision",
    "train",
]
