"""What recording costs a compiled model: compiled code calls no hooks, so that recorded steps run eager.

Custom operators in the graph would record without leaving it; docs/decisions.md has why that is not done.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from typing import Any

from torch import nn

_KEPT = 1000  # steps of either kind


class EagerCost:
    """Times of recorded (eager) and other (compiled) steps of a run whose model is under torch.compile.

    Milliseconds of the host from the end of one `Recorder.step()` to the beginning of the next. Steps in which
    something was compiled do not count, and the first of each kind is left out where there are others.
    """

    def __init__(self, model: nn.Module) -> None:
        self._compiled = is_compiled(model)
        self._times: dict[bool, deque[float]] = {True: deque(maxlen=_KEPT), False: deque(maxlen=_KEPT)}
        self._first: dict[bool, float] = {}

    def begin(self, *, recorded: bool) -> None:
        """Begin a step."""
        self._recorded, self._graphs, self._began = recorded, _graphs(), time.perf_counter()

    def end(self) -> None:
        """End it."""
        took = 1e3 * (time.perf_counter() - self._began)
        if _graphs() != self._graphs:
            self._compiled = True  # the loop calls a compiled wrapper of the model that was given
        elif self._recorded in self._first:
            self._times[self._recorded].append(took)
        else:
            self._first[self._recorded] = took

    def describe(self) -> dict[str, Any]:
        """For run.json: the key "compiled" where the model is, medians in milliseconds and their ratio where both kinds
        of steps were seen."""
        if not self._compiled:
            return {}
        medians = [statistics.median(self._times[k] or [self._first.get(k, float("nan"))]) for k in (True, False)]
        recorded_ms, other_ms = (None if m != m else m for m in medians)
        ratio = recorded_ms / other_ms if recorded_ms is not None and other_ms else None
        cost = "" if ratio is None else f", {ratio:.2f} times as long as the compiled ones"
        note = f"recorded steps ran eager{cost}; their numbers are those of eager mode, which differ a little"
        return {"compiled": {"note": note, "recorded_ms": recorded_ms, "other_ms": other_ms, "ratio": ratio}}


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` or a module in it is under torch.compile, by either of its ways."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _graphs() -> int:
    """How many graphs this process has compiled. torch._dynamo takes seconds to import: where nobody has, none."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]
