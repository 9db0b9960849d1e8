"""Experiment loggers: a run directory's figures told to TensorBoard, Weights & Biases or MLflow.

    ps.train(task, steps=500, out="runs/b", progress=RunLog("runs/b", WandbLogger("my-project"), precision="fp16"))

    with RunLog("runs/a", MlflowLogger("sqlite:///mlflow.db"), precision="bf16") as log:
        with ps.record(model, "runs/a") as rec:        # a loop of your own; the log is entered first
            for step, batch in enumerate(loader):
                ...
                rec.step()
                log.scalars(step, loss=loss.item())    # what you have anyway

    log_run("runs/a", TensorBoardLogger("boards/a"))       # after the fact

What is told, under the names of the TensorBoard writer that `--tensorboard` opens (precscope.live):

    train/loss, lr, loss_scale, skipped, grad_norm, step_time_ms    per step
    log2_magnitude/<site>                       per flush: counts per binade [e, e + 1) of log2 |x|
    headroom/least, headroom/<site>             per flush: binades from the largest magnitude to the end of the format
    flushed/most, flushed/<site>                per flush: share of values that the format rounds to zero
    report.html                                 at the end, where statistics were recorded

Everything comes from what the trainer reads from the device anyway and from parts that the recorder has flushed: no
hook, no wait for the device, the run is the same bit for bit. A logger that fails is warned about once and left alone.

Tested with wandb 0.31, mlflow-skinny 3.17, tensorboard 2.21.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PrecscopeError, RunDirectoryError, one_line
from ..formats import FloatFormat
from ..live.boards import TAG
from ..live.parts import COUNTED, Flushed, Parts, flushed_of
from ..live.watching import formats_of
from ..sites import Site
from ..store import list_parts, read_part
from .log_writers import Histogram, Logger, MlflowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from ..training.log import Row

__all__ = [
    "Histogram", "Logger", "MlflowLogger", "RunLog", "TensorBoardLogger", "WandbLogger", "log_run", "logging_to",
]  # fmt: skip

_POINTS = 100  # of a run that is told after the fact: flushes beyond are put together


class RunLog:
    """Tells one or several loggers what becomes of the run in directory `run`, while it goes on.

    A context manager, and a callback that ps.train and ps.profile take as progress. precision, plan: what the run
    computes in, for head-room and flushed shares; in fp32 they are those of fp16. worst: sites told apart at each
    flush; most: sites with histograms. report: whether to make the HTML report at the end. beside: another callback to
    pass everything on to. failed: why telling stopped, "" while it goes on.
    """

    def __init__(
        self,
        run: str | Path,
        *loggers: Logger,
        precision: str | None = None,
        plan: PrecisionPlan | str | Path | None = None,
        worst: int = 8,
        most: int = 2000,
        report: bool = True,
        beside: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.run, self.loggers, self.plan, self.report, self.beside = Path(run), list(loggers), plan, report, beside
        self.worst, self.most, self.failed, self._all = worst, most, "", tuple(loggers)
        self._format_of, _ = formats_of(precision, plan)
        self._parts: Parts | None = Parts(self.run)
        self._skipped, self._next, self._began, self._told, self._closed = 0, 0, False, False, False
        self._sites: dict[str, set[Site]] = {"headroom": set(), "flushed": set(), TAG: set()}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def read(self, rows: list[Row]) -> None:
        """The trainer has read the figures of these steps."""
        if hasattr(self.beside, "read"):
            self.beside.read(rows)  # type: ignore[union-attr]
        if not rows:
            return
        self._begin(rows[0].step)
        self._next = rows[-1].step + 1
        for row in rows:
            self._skipped += row.skipped
            values = {
                "loss": row.loss, "lr": row.lr, "loss_scale": row.scale, "skipped": float(self._skipped),
                "grad_norm": row.grad_norm, "step_time_ms": row.time_ms,
            }  # fmt: skip
            self._tell(lambda to, v=values, s=row.step: to.scalars({f"train/{k}": x for k, x in v.items()}, s))

    def __call__(self, done: int, total: int, loss: float) -> None:
        """The callback that ps.train and ps.profile take as progress."""
        if self.beside is not None:
            self.beside(done, total, loss)
        self._began = True
        self._take()

    def scalars(self, step: int, /, **values: float) -> None:
        """For loops of one's own: figures of step `step`, told as train/NAME, and what was flushed since."""
        self._begin(step)
        self._next = step + 1
        self._tell(lambda to: to.scalars({f"train/{name}": float(value) for name, value in values.items()}, step))
        self._take()

    def close(self, *, failed: bool = False) -> None:
        """Tell what was flushed last, hand over the report, and end. Again: nothing. Loggers are closed whatever
        comes before; as of a failed run, where that raises."""
        if self._closed:
            return
        self._closed, told_all = True, False
        try:
            if self._began or not failed:  # else what lies there is of another run
                self._take()
                self._settings()
                if self.report and not self.failed and any(self.run.glob("stats-*.parquet")):
                    self._hand_over_report()
            told_all = True
        finally:
            for logger in self._all:
                told = logger in self.loggers
                with self._giving_up(logger) if told else contextlib.suppress(OSError, *logger.errors):
                    logger.close(failed=failed or not told_all)

    def told(self, flushed: Flushed) -> None:
        """Tell what was flushed: histograms, head-room, flushed shares."""
        self._settings()
        step = flushed.steps[-1]
        room = self._room(flushed, step)
        lost = self._lost(flushed, step)
        values = {f"headroom/{s}": x for s, x in self._followed("headroom", room, largest=False).items()}
        values |= {f"flushed/{s}": x for s, x in self._followed("flushed", lost, largest=True).items()}
        if room:
            values["headroom/least"] = min(room.values())
        if lost:
            values["flushed/most"] = max(lost.values())
        known = self._sites[TAG]
        known.update([s for s in flushed.sites if s not in known][: max(self.most - len(known), 0)])
        drawn = {f"{TAG}/{s}": Histogram.of(flushed.table, i) for i, s in enumerate(flushed.sites) if s in known}
        filled = {tag: histogram for tag, histogram in drawn.items() if histogram is not None}
        self._tell(lambda to: to.scalars(values, step))
        self._tell(lambda to: to.histograms(filled, step))

    # internals

    def _begin(self, step: int) -> None:
        if self._parts is not None and (not self._began or step < self._next):
            self._parts.begin(step)
        self._began = True

    def _take(self) -> None:
        flushed = None if self._parts is None or not self.loggers else self._parts.look()
        if flushed is not None:
            self.told(flushed)

    def _room(self, flushed: Flushed, step: int) -> dict[Site, float]:
        """Site -> binades left, for the sites nearest to the end of their format and those that were once."""
        near = flushed.nearest(lambda module: self._format_of(module, step), len(flushed.sites))
        return {site: room for room, site, _, _ in near}

    def _lost(self, flushed: Flushed, step: int) -> dict[Site, float]:
        """Site -> share of values that are zero in its module's format, under the loss scale that they had."""
        table = flushed.table
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(table.amax > 0, np.log2(flushed.reach / table.amax), 0.0)
        scale = np.rint(np.nan_to_num(scale, posinf=0.0, neginf=0.0)).astype(np.int64)
        rows: dict[FloatFormat, list[int]] = {}
        for i, site in enumerate(flushed.sites):
            fmt = self._format_of(site.module, step) if site.role in COUNTED else None
            if fmt is not None and table.count[i]:
                rows.setdefault(fmt, []).append(i)
        found = {}
        for fmt, own in rows.items():
            shares = table.take(own).ask(fmt, scale_exponent=scale[own])["flushed"]
            found |= {flushed.sites[i]: float(share) for i, share in zip(own, shares, strict=True)}
        return found

    def _followed(self, what: str, values: dict[Site, float], *, largest: bool) -> dict[Site, float]:
        """The worst sites of now, and those that were among them before, so that a curve goes on."""
        known = self._sites[what]
        worst = sorted(values, key=lambda s: (-values[s] if largest else values[s], str(s)))[: self.worst]
        new = [s for s in worst if s not in known and (values[s] > 0 or not largest)]
        known.update(new[: max(4 * self.worst - len(known), 0)])
        return {site: values[site] for site in values if site in known}

    def _settings(self) -> None:
        """What run.json says of the run, once it is there."""
        path = self.run / "run.json"
        if self._told or not path.is_file():
            return
        self._told = True
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            plain = {k: v for k, v in content.items() if isinstance(v, (str, int, float, bool))}
            self._tell(lambda to: to.settings({"run": str(self.run), **plain}))

    def _hand_over_report(self) -> None:
        from ..reporting import report

        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "report.html"
                report(self.run, out=path, plan=self.plan)
                self._tell(lambda to: to.artefact(path))
        except (PrecscopeError, OSError) as error:  # a full disk is no reason to end the run that is told of
            why = str(error) if isinstance(error, PrecscopeError) else one_line(error)
            warnings.warn(f"no report of {self.run} for the logger: {why}", RuntimeWarning, stacklevel=4)

    def _tell(self, what: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            with self._giving_up(logger):
                what(logger)

    @contextlib.contextmanager
    def _giving_up(self, logger: Logger) -> Iterator[None]:
        """What is logged goes on where a logger fails: a full disk or a lost server must not end a run."""
        try:
            yield
        except (OSError, *logger.errors) as error:
            if logger in self.loggers:
                self.loggers.remove(logger)
            self.failed = self.failed if self.loggers else one_line(error)
            warnings.warn(
                f"{type(logger).__name__} is told no more of {self.run} ({one_line(error)}); the run itself goes on, "
                "and log_run tells it all afterwards",
                RuntimeWarning,
                stacklevel=2,
            )


def log_run(
    run: str | Path,
    *loggers: Logger,
    precision: str | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    report: bool = True,
) -> None:
    """Tell loggers of a run that is over, from its directory: all that RunLog tells while one goes on.

    precision: what the run computed in; None: what its run.json says. Raises RunDirectoryError where there is no run.
    """
    from ..profiles import Profile

    directory = Path(run)
    profile = Profile.load(directory)
    precision = precision or (None if plan is not None else _precision(profile.run))
    log = RunLog(directory, *loggers, precision=precision, plan=plan, report=report)
    with log:
        if profile.train is not None:
            from ..training.log import read_log

            log.read(read_log(directory))
        log._parts = None  # what was flushed is told here, group by group
        for flushed in _history(directory):
            log.told(flushed)


def _precision(info: Mapping[str, Any]) -> str | None:
    """What run.json says, where it is a format's name."""
    from ..errors import FormatError
    from ..formats import get_format

    name = info.get("precision")
    with contextlib.suppress(FormatError, AttributeError, TypeError):
        return get_format(name).name if isinstance(name, str) else None
    return None


def _history(directory: Path) -> Iterator[Flushed]:
    """The recorded steps in order, in at most `_POINTS` groups. A part that cannot be read is left out."""
    tables = []
    for path in list_parts(directory, "stats"):
        with contextlib.suppress(RunDirectoryError):
            tables.append(read_part(path))
    steps = np.unique(np.concatenate([t.column("step").to_numpy() for t in tables] or [np.zeros(0, np.int64)]))
    for group in np.array_split(steps, min(_POINTS, max(1, -(-len(steps) // 10)))) if len(steps) else ():
        chosen = []
        for table in tables:
            rows = np.flatnonzero(np.isin(table.column("step").to_numpy(), group))
            chosen += [table.take(rows)] if len(rows) else []
        yield flushed_of(chosen)


@contextlib.contextmanager
def logging_to(
    out: str | Path,
    *,
    beside: Callable[[int, int, float], None] | None = None,
    wandb: str | None = None,
    mlflow: str | None = None,
    precision: str | None = None,
    plan: PrecisionPlan | str | Path | None = None,
) -> Iterator[Callable[[int, int, float], None] | None]:
    """The callback for a run into `out` that tells W&B (project `wandb`) and MLflow (tracking URI `mlflow`), and passes
    on to `beside`; `beside` itself where neither is wanted. For the command line."""
    if wandb is None and mlflow is None:
        yield beside
        return
    name = Path(out).name
    loggers: list[Logger] = [] if wandb is None else [WandbLogger(wandb, name=name)]
    loggers += [] if mlflow is None else [MlflowLogger(mlflow, name=name)]
    with RunLog(out, *loggers, precision=precision, plan=plan, beside=beside) as log:
        yield log
