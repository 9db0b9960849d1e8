"""The protocol of a logger, and three: TensorBoard, Weights & Biases, MLflow. `loggers` feeds them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UsageError, first_line
from ..live.boards import raw_histogram, writer_class
from ..stats import StatsTable
from .missing import need


@dataclass(frozen=True)
class Histogram:
    """Counts per binade of log2 |x|. edges: float64 [n + 1], whole numbers one apart. counts: int64 [n]: the finite
    values that are not 0 with edges[i] <= log2 |x| < edges[i + 1]. raw: as TensorBoard takes it."""

    edges: np.ndarray
    counts: np.ndarray
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, table: StatsTable, row: int) -> Histogram | None:
        """Of one row of a table, None where it has no such value."""
        for raw in raw_histogram(table, row):
            edges = np.asarray(raw["bucket_limits"], float)
            return cls(edges, np.asarray(raw["bucket_counts"][1:]).astype(np.int64), raw)
        return None


class Logger(Protocol):
    """What a run is told to. errors: what it raises where it cannot write any more; RunLog lets it go then.

    settings: once, what the run is. scalars and histograms: by tag, at a step; steps of one tag rise, those of
    different tags may come in any order. artefact: a file, which is gone after the call. close: the end; failed: the
    run raised.
    """

    errors: tuple[type[Exception], ...]

    def settings(self, values: Mapping[str, Any]) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None: ...

    def artefact(self, path: Path) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


class TensorBoardLogger:
    """An event file in the directory `to`, report.html beside it. Raises UsageError where tensorboard is missing."""

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, to: str | Path) -> None:
        self.to = Path(to)
        self._make, self._open = writer_class(), None

    def settings(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in values.items()))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        for tag, histogram in histograms.items():
            self._writer.add_histogram_raw(tag, **histogram.raw, global_step=step)

    def artefact(self, path: Path) -> None:
        self.to.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.to / path.name)

    def close(self, *, failed: bool = False) -> None:
        if self._open is not None:
            self._open.close()

    @property
    def _writer(self) -> Any:
        if self._open is None:  # nothing is written before there is something to write
            self.to.mkdir(parents=True, exist_ok=True)
            self._open = self._make(str(self.to))
        return self._open


class WandbLogger:
    """A Weights & Biases run.

    project, name: as wandb.init takes them. mode: "online", "offline" (no network; `wandb sync` later) or None: what
    WANDB_MODE says. run: one that is open already; it is not ended here. more: further arguments of wandb.init.
    Points carry their step as the metric "step": W&B's own steps may only rise, and histograms come after their steps.
    Raises UsageError where wandb is missing.
    """

    def __init__(
        self, project: str | None = None, *, name: str | None = None, mode: str | None = None, run: Any = None,
        **more: Any,
    ) -> None:  # fmt: skip
        self._wandb = need("wandb", "loggers")
        self.errors: tuple[type[Exception], ...] = (self._wandb.Error,)
        self._own, self._run = run is None, run
        self._arguments = {"project": project, "name": name, "mode": mode, **more}
        if run is not None:
            self._define()

    @property
    def run(self) -> Any:
        """The wandb run; it begins with the first thing that is told."""
        if self._run is None:
            self._run = self._wandb.init(**self._arguments)
            self._define()
        return self._run

    def _define(self) -> None:
        for tags in ("train/*", "log2_magnitude/*", "headroom/*", "flushed/*"):
            self._run.define_metric(tags, step_metric="step")

    def settings(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if values:
            self.run.log({**values, "step": step})

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        drawn = {
            tag: self._wandb.Histogram(np_histogram=(h.counts.tolist(), h.edges.tolist()))
            for tag, h in histograms.items()
        }
        if drawn:
            self.run.log({**drawn, "step": step})

    def artefact(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"{path.stem}-{self.run.id}", type="report")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self, *, failed: bool = False) -> None:
        if self._own and self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)


class MlflowLogger:
    """An MLflow run.

    uri: tracking URI: a folder ("mlruns"), sqlite:///FILE, or a server. newer versions (3.17) take folders only where
    the environment has MLFLOW_ALLOW_FILE_STORE=true. experiment: made where it is not there. name: of the run. run_id:
    a run that is open already; it is not ended here. Histograms, which MLflow does not know, become artefacts,
    histograms/step-NNNNNNNN.json: tag -> edges and counts. Characters that MLflow does not allow in names become ":" or
    "_". Raises UsageError where mlflow is missing or refuses the URI.
    """

    def __init__(
        self, uri: str | Path, *, experiment: str = "precscope", name: str | None = None, run_id: str | None = None
    ) -> None:
        tracking = need("mlflow.tracking", "loggers", package="mlflow-skinny")
        self._entities, exceptions = need("mlflow.entities", "loggers"), need("mlflow.exceptions", "loggers")
        self.errors: tuple[type[Exception], ...] = (exceptions.MlflowException,)
        self._own, self._name, self._experiment, self._id = run_id is None, name, experiment, run_id
        try:
            self.client = tracking.MlflowClient(tracking_uri=str(uri))
        except exceptions.MlflowException as error:
            raise UsageError(f"MLflow refuses {str(uri)!r}: {first_line(error)}") from error

    @property
    def run_id(self) -> str:
        """The MLflow run; it begins with the first thing that is told."""
        if self._id is None:
            found = self.client.get_experiment_by_name(self._experiment)
            experiment = found.experiment_id if found else self.client.create_experiment(self._experiment)
            self._id = self.client.create_run(experiment, run_name=self._name).info.run_id
        assert self._id is not None
        return self._id

    def settings(self, values: Mapping[str, Any]) -> None:
        params = [self._entities.Param(_allowed(name), str(value)[:500]) for name, value in values.items()]
        self.client.log_batch(self.run_id, params=params)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_allowed(tag), float(value), now, step) for tag, value in values.items()]
        for start in range(0, len(metrics), 500):  # MLflow takes 1000 at once
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 500])

    def histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        drawn = {tag: {"edges": h.edges.tolist(), "counts": h.counts.tolist()} for tag, h in histograms.items()}
        if drawn:
            self.client.log_text(self.run_id, json.dumps(drawn), f"histograms/step-{step:08d}.json")

    def artefact(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def close(self, *, failed: bool = False) -> None:
        if self._own and self._id is not None:
            self.client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _allowed(name: str) -> str:
    """A name that MLflow takes: "0.weight[bias]" -> "0.weight:bias", "net#1.output" -> "net:1.output"."""
    name = re.sub(r"\[(.*?)\]", r":\1", name).replace("#", ":").replace("(root)", "root")
    return re.sub(r"[^\w\-. /:]", "_", name)


__all__ = ["Histogram", "Logger", "MlflowLogger", "TensorBoardLogger", "WandbLogger"]
