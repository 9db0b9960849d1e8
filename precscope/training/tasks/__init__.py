"""Tasks that come with precscope: real data and, where packages carry them, real pretrained weights; small by default.

One file a task; `precscope.bundled` says, without torch, what each is and needs. `accuracy(model, task)` measures those
that sort into classes.
"""

from .classifying import accuracy, majority

__all__ = ["accuracy", "majority"]
