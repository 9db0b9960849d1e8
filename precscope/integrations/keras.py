"""Keras 3 on the torch backend: `fit`, `evaluate` and `predict` recorded.

    from precscope.integrations.keras import RecordCallback

    model.fit(x, y, callbacks=[RecordCallback("runs/a", every=10)])
    profile = ps.Profile.load("runs/a")
    plan = ps.recommend(profile, formats=("bf16", "fp32"), policy="cast")    # "cast" is what Keras's policies do
    policies = to_policy_map(plan, names=model)                              # precscope.converting.kerasmap

Layers are named by the way that leads to them, joined by dots ("encoder.dense"; "" is the model), their variables as in
Keras ("kernel", "bias"); run.json has the Keras path of each under "keras". What is recorded of a training step: inputs
and outputs of every layer with their gradients, variables and theirs, what the step did to them (constraints and moving
averages included), and the optimizer's state. Loss scales, of LossScaleOptimizer or loss_scale_factor, are divided out
of gradients and stored beside them. Validation, and anything else outside training batches, is not recorded.

What is not: keras.ops that a Functional model calls between layers (their results are seen where a layer takes them),
Sequential models inside others (their layers are), gradients after clipping, and shadow steps, so that loss noise is
not priced. A recording that is given to `predict` or `evaluate` is one of inference, a step per batch.

Tested with keras 3.15.1 on torch 2.13, CPU.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UsageError
from .missing import need

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported first
keras = need("keras", "keras")

from .keras_recorder import KerasRecorder  # noqa: E402  # keras first: its absence is to be told

_METHODS = {"train": "fit", "test": "evaluate", "predict": "predict"}


class RecordCallback(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
    """Records the model it is given to into the run directory `out`.

    every: record steps 0, every, 2 every, ... of the optimizer (of predict and evaluate: batches). The other settings
    are those of `ps.record`: flush_every, max_calls, on_error, exist, info. A further `fit` with the same object goes
    on with the same run; `evaluate` and `predict` need an object, and a directory, of their own. recorder: the running
    one, None outside.

    Hooks are in place only while a recorded batch is trained. A training step that raises ends the recording, and
    leaves what was recorded; where something else in `fit` may raise, `close` the callback, or let a block do it:

        with RecordCallback("runs/a") as record:
            model.fit(x, y, callbacks=[record])

    Weights and losses are the same bit for bit with and without it. Raises UsageError where Keras runs on another
    backend than torch, where it is given to `evaluate` or `predict` after `fit` (or the other way round), and as
    `ps.record` does.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int = 10,
        flush_every: int = 10,
        max_calls: int = 16,
        on_error: str = "warn",
        exist: str = "error",
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if keras.backend.backend() != "torch":
            raise UsageError(
                f"Keras runs on {keras.backend.backend()} here, and precscope records torch: set the environment "
                "variable KERAS_BACKEND=torch before keras is imported"
            )
        self.out, self.every = Path(out), every
        self._settings: dict[str, Any] = {
            "every": every, "flush_every": flush_every, "max_calls": max_calls, "on_error": on_error, "exist": exist,
            "info": info,
        }  # fmt: skip
        self.recorder: KerasRecorder | None = None
        self._kind: str | None = None  # of what is recorded: "train", "test" (evaluate) or "predict"
        self._held: str | None = None  # of what `out` holds of ours
        self._watched: Any = None  # the model's function for a batch, in our wrapping
        self._next = 0  # step of a further fit

    def on_train_begin(self, logs: Any = None) -> None:
        self._open("train")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("train")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("train")

    def on_train_end(self, logs: Any = None) -> None:
        self.close()

    def on_predict_begin(self, logs: Any = None) -> None:
        self._open("predict")

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("predict")

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("predict")

    def on_predict_end(self, logs: Any = None) -> None:
        self.close()

    def on_test_begin(self, logs: Any = None) -> None:
        if self._kind != "train":  # fit's own validation is not recorded
            self._open("test")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("test")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("test")

    def on_test_end(self, logs: Any = None) -> None:
        if self._kind == "test":
            self.close()

    def close(self, error: BaseException | None = None) -> None:
        """End the recording and write what is left; `error`: what ended it. Without a recording: nothing."""
        recorder, self.recorder = self.recorder, None
        self._unwrap()
        self._kind = None
        if recorder is not None:
            self._next = recorder.index
            recorder.__exit__(None if error is None else type(error), error, None)

    def __enter__(self) -> RecordCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(value)

    def _open(self, kind: str) -> None:
        if self._held not in (None, kind):
            raise UsageError(
                f"{self.out} holds what {_METHODS[self._held]} recorded: give {_METHODS[kind]} a RecordCallback of its "
                "own"
            )
        if self.recorder is not None:
            self.close(UsageError("the run was left without its end, and went on in a part of its own"))
        again = {"exist": "append", "first_step": self._next} if self._next else {}
        recorder = KerasRecorder(self.model, self.out, kind=kind, **{**self._settings, **again})
        self.recorder, self._kind, self._held = recorder.__enter__(), kind, kind

    def _begin(self, kind: str) -> None:
        if self.recorder is not None and kind == self._kind:
            self._wrap(f"{kind}_function")

    def _end(self, kind: str) -> None:
        if self.recorder is None or kind != self._kind:
            return
        if self.recorder.is_step():
            self.recorder.step()

    def _wrap(self, name: str) -> None:
        """Put ourselves around what trains a batch: other callbacks may run the model, too, and Keras tells callbacks
        nothing of a step that raises. Keras makes the function anew where a model is compiled in mid-run."""
        function = getattr(self.model, name)
        if function is self._watched:
            return

        @functools.wraps(function)
        def watched(data: Any) -> Any:
            if self.recorder is None:
                return function(data)
            try:
                self.recorder.begin()
                return function(data)
            except BaseException as error:
                self.close(error)
                raise
            finally:
                if self.recorder is not None:
                    self.recorder.pause()

        self._watched, self._function = watched, function
        setattr(self.model, name, watched)

    def _unwrap(self) -> None:
        for name in ("train_function", "test_function", "predict_function"):
            if self._watched is not None and getattr(self.model, name, None) is self._watched:
                setattr(self.model, name, self._function)
        self._watched = self._function = None
