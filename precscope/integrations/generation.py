"""Recording `model.generate`: what inference meets, the prompt's pass and the passes of one token each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..recording import Recorder, record


@contextmanager
def record_generation(model: nn.Module, out: str | Path, *, every: int = 1, **settings: Any) -> Iterator[Recorder]:
    """Record what happens in `model.generate` into the run directory `out`; each call of it is a step.

    A row sums over the passes of a step: that of the prompt (prefill) and those of the new tokens, one each. Keys and
    values show as outputs of their projections; cache objects are left alone. What runs outside generate is not
    recorded. The tokens are the same with and without it.

    every: record calls 0, every, 2 every, ... settings: as in `ps.record` (flush_every, exist, max_calls, info, ...),
    without optimizer. Raises UsageError where the model has no generate or an optimizer is given; UsageError,
    ModelError, RunDirectoryError as `ps.record`.
    """
    own = getattr(model, "generate", None)
    if not callable(own):
        raise UsageError(
            f"{type(model).__name__} has no generate(): give a model that generates, or record its calls with "
            "ps.record(model, out) and rec.step()"
        )
    if "optimizer" in settings:
        raise UsageError(
            "record_generation takes no optimizer=: with one, passes without gradients are left out as evaluations, "
            "and generation has no others. Leave it out; ps.record(model, out, optimizer=...) records training"
        )
    before, depth = vars(model).get("generate"), 0
    between = ExitStack()  # two calls: what runs there is not recorded
    info = {"task": f"{type(model).__name__}.generate", "mode": "inference", **_precision(model)}
    settings["info"] = {**info, **(settings.get("info") or {})}
    with record(model, out, every=every, **settings) as recorder:
        between.enter_context(recorder.paused())

        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:  # some models' generate calls itself
                return own(*args, **kwargs)
            depth += 1
            between.close()
            try:
                result = own(*args, **kwargs)
                recorder.step()
                return result
            finally:
                depth -= 1
                between.enter_context(recorder.paused())

        model.generate = generate  # type: ignore[assignment]
        try:
            yield recorder
        finally:
            between.close()
            if before is None:
                del model.generate
            else:
                model.generate = before


def _precision(model: nn.Module) -> dict[str, str]:
    """In which format the model runs, where that is one."""
    from ..applying.spec import MARK

    if any(MARK in vars(module) for module in model.modules()):
        return {"precision": "plan"}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return {"precision": names[kinds.pop()]} if len(kinds) == 1 and kinds <= set(names) else {}
