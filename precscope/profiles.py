"""A recorded run, read as tables: `Profile.load("runs/a").ask("e5m2", scale_exponent=12)`.

A Profile holds, per site, the statistics summed over all recorded steps (histograms add up); the scalars per step and
site, which make a history, are read from the directory when they are asked for. Any format and power-of-two scale is
answered from them, without the model and without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .errors import RunDirectoryError, UsageError, nearest
from .formats import FloatFormat, get_format
from .sites import Role, Site
from .stats import StatsTable
from .store import (
    HISTORY,
    Peaks,
    Totals,
    as_arrow,
    joined,
    list_parts,
    load_totals,
    of_steady_parts,
    read_history,
    read_part,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from .opstore import OpRecords

T = TypeVar("T")


@dataclass
class Profile:
    """Statistics of one recorded run.

    path: the run directory. run: content of run.json. sites: one Site per row of `table`. table: statistics summed over
    steps. ratios: site index -> (histogram of floor(log2|dw|) - floor(log2|w|) int64[BINS], unchanged, from zero).
    graph: content of graph.json ({} where absent). damaged: parts that were skipped.
    shadow: a Profile of the shadow steps alone (fp32, uncensored; its table has `weights`, see `loss_noise` in `ask`),
    None where there were none. truth: what those steps said of the run's own precision, a row per (step, parameter):
    step, parameter, module, cosine and rel_error of its gradient against the fp32 one, grad_norm_fp32, loss_low,
    loss_fp32; None where there were none. rounded: of a shadow profile: format -> mean over its steps of the squared
    change of the loss when the tensor is really rounded, float64[sites], NaN but for parameters. times: how many rows
    (steps, on each process that writes) each site has, most: elements in one of them, at most, both int64[sites].
    """

    path: Path
    run: dict[str, Any]
    sites: list[Site]
    table: StatsTable
    ratios: dict[int, tuple[np.ndarray, int, int]]
    graph: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    shadow: Profile | None = field(default=None, repr=False)
    truth: pd.DataFrame | None = field(default=None, repr=False)
    rounded: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    times: np.ndarray | None = field(default=None, repr=False)
    most: np.ndarray | None = field(default=None, repr=False)
    _history: pd.DataFrame | None = field(default=None, repr=False)
    _steps: list[int] | None = field(default=None, repr=False)
    _kind: str = field(default="stats", repr=False)
    _skip_damaged: bool = field(default=False, repr=False)

    @classmethod
    def load(cls, path: str | Path, *, skip_damaged: bool = False) -> Profile:
        """Read a run directory, also one whose process was killed while writing it.

        skip_damaged: leave out truncated or foreign parts (they are named in `damaged`) instead of raising.
        Raises RunDirectoryError where there is no run, or a part is truncated, foreign or of a newer schema.
        """
        path = Path(path)
        if not path.is_dir():
            others = [p.parent.name for p in path.parent.glob("*/run.json")] if path.parent.is_dir() else []
            hint = nearest(path.name, others)
            raise RunDirectoryError(
                f"no run directory at {path}" + (f" (did you mean {hint}?)" if hint else "") + ": record one with "
                "precscope profile TASK --out DIR"
            )
        damaged: list[str] = []
        run = _read_json(path / "run.json")
        world = run.get("merged_over", 0)  # of processes whose rows add up, gradients divided by their number
        totals = _sums(path, "stats", skip_damaged, damaged)
        priced = _sums(path, "shadow", skip_damaged, damaged)
        truth = [table for _, table in _parts(path, "truth", skip_damaged, damaged)]
        if not run and not len(totals):
            raise RunDirectoryError(
                f"{path} holds no recorded run: record one with precscope profile TASK --out {path}"
            )
        graph = _read_json(path / "graph.json")
        shadow = _shadow(path, run, graph, priced, damaged, skip_damaged) if len(priced) else None
        return cls(path, run, list(totals.sites), totals.table(world=world), totals.ratios(), graph, damaged, shadow,
                   _truth(truth), times=totals.rows, most=totals.most,
                   _steps=sorted(totals.steps), _skip_damaged=skip_damaged)  # fmt: skip

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have statistics, in the order of recording."""
        return list(dict.fromkeys(s.module for s in self.sites))

    @property
    def steps(self) -> list[int]:
        """Recorded steps, ascending."""
        if self._steps is None:
            self._steps = [] if self._history is None else sorted(self._history.step.unique().tolist())
        return self._steps

    @property
    def train(self) -> pd.DataFrame | None:
        """The training log (step, loss, lr, scale, skipped, time_ms ...), None where the run has none."""
        import pandas as pd

        path = self.path / "train.parquet"
        return pd.read_parquet(path) if path.exists() else None

    @property
    def cost(self) -> pd.DataFrame | None:
        """Measured times per module and format (module, format, time_ms, ...), None where none were measured."""
        import pandas as pd

        path = self.path / "cost.parquet"
        return pd.read_parquet(path) if path.exists() else None

    @cached_property
    def ops(self) -> OpRecords | None:
        """What was recorded at op level (see `ops.ask(format)`), None where nothing was. Damaged parts are left out."""
        from .opstore import load_ops

        records = load_ops(self.path, skip_damaged=True)
        return records if len(records) else None

    def merged(self, by: str = "site") -> tuple[list[Site], StatsTable]:
        """Sites and their statistics; by="site" merges the tensors of one (module, role, call), by="tensor" does not,
        by="module" also merges the calls."""
        if by == "tensor":
            return self.sites, self.table
        if by not in ("site", "module"):
            raise UsageError(f"by must be 'site', 'tensor' or 'module', not {by!r}")
        keys: dict[Site, int] = {}
        index = [keys.setdefault(_merged_site(s, by), len(keys)) for s in self.sites]
        return list(keys), self.table.group(np.asarray(index, np.int64), len(keys))

    def ask(
        self,
        format: str | FloatFormat,
        *,
        scale_exponent: int = 0,
        by: str = "site",
        roles: Iterable[str] | None = None,
    ) -> pd.DataFrame:
        """What `format` would do to every recorded tensor, were it multiplied by 2^scale_exponent first.

        Returns a row per site: module, role, call (and tensor with by="tensor"), count, amax, amin_nonzero (unscaled;
        NaN where all elements are zero), zeros, nonfinite (shares of count, as recorded), overflow_lo, overflow_hi
        (the share that rounds beyond the largest finite value lies between them), flushed, subnormal (shares of
        count), sqnr_db (dB, over elements that do not overflow; inf where rounding is exact), loss_noise (standard
        deviation of the change of one step's loss if this site's fp32 values alone were rounded: from the mean over the
        shadow steps of its gradient-weighted histograms, so neither the number of steps nor what the run's own
        precision did to the values enters; NaN where no shadow step saw a gradient there).

        Raises FormatError for an unknown format, UsageError for unknown roles.
        """
        import pandas as pd

        fmt = get_format(format)
        sites, table = self.merged(by)
        if roles is not None:
            wanted = _roles(roles)
            keep = np.asarray([i for i, s in enumerate(sites) if s.role in wanted], np.int64)
            sites, table = [sites[i] for i in keep], table.take(keep)
        count = np.maximum(table.count, 1)
        columns: dict[str, Any] = {
            "module": [s.module for s in sites],
            "role": [s.role.value for s in sites],
            "call": [s.call for s in sites],
        }
        if by == "tensor":
            columns["tensor"] = [s.tensor for s in sites]
        columns |= {
            "count": table.count,
            "amax": table.amax,
            "amin_nonzero": np.where(np.isfinite(table.amin_nonzero), table.amin_nonzero, np.nan),
            "zeros": table.zeros / count,
            "nonfinite": (table.pos_inf + table.neg_inf + table.nan) / count,
        }
        answers = table.ask(fmt, scale_exponent=scale_exponent)
        priced = self if self.shadow is None else self.shadow
        if priced.table.weights is not None:
            answers["loss_noise"] = priced._loss_noise(sites, fmt, scale_exponent, by)
        return pd.DataFrame(columns | answers)

    def _loss_noise(self, sites: list[Site], fmt: FloatFormat, scale_exponent: int, by: str) -> np.ndarray:
        """What this profile's weights say of `sites`: float64 [sites], NaN for those that it does not price.

        Variances of the tensors of a site add up. For a parameter, what really rounding it did in each of the n shadow
        steps is known too; its errors need not be independent (a norm's weights that lie around 1 all move the same
        way). The variance is the mean of n + 1 estimates: these n squared changes and the one of independent errors.
        """
        variance = self.table.ask(fmt, scale_exponent=scale_exponent)["loss_noise"] ** 2
        real = self.rounded.get(fmt.name) if scale_exponent == 0 else None
        if real is not None:
            steps = len(self.steps)
            variance = np.where(np.isnan(real), variance, (steps * real + variance) / (steps + 1))
        total: dict[Site, float] = {}
        for site, value in zip(self.sites, variance.tolist(), strict=True):
            key = _merged_site(site, by)
            if value == value:
                total[key] = total.get(key, 0.0) + value
        return np.sqrt([total.get(site, np.nan) for site in sites])

    def history(self, columns: Sequence[str] | None = None, *, roles: Collection[str] | None = None) -> pd.DataFrame:
        """A row per (step, site): step, module, role, call, tensor, source, count, zeros, pos_inf, neg_inf, nan, amax,
        amin_nonzero, sum, sumsq, loss_scale. Gradients have the loss scale divided out already.

        columns: these alone. roles: rows of these alone. Both save time and memory where a run is long: about 0.1 kB
        a row. The rows of one site ascend in step. Read from the directory, which must still be there; steps that were
        recorded since the run was loaded are left out.
        Raises UsageError for an unknown column, RunDirectoryError where a part is gone or damaged.
        """
        wanted = HISTORY if columns is None else tuple(columns)
        unknown = [name for name in wanted if name not in HISTORY]
        if unknown:
            raise UsageError(f"no column {unknown[0]!r} in the history; columns are {', '.join(HISTORY)}")
        if self._history is None and columns is None and roles is None:
            self._history = self._scalars(HISTORY, lambda tables: joined(tables, HISTORY, None))
        if self._history is None:
            return self._scalars((*wanted, "role"), lambda tables: joined(tables, wanted, roles))
        rows = self._history if roles is None else self._history[self._history.role.isin(list(roles))]
        return rows if columns is None else rows[list(wanted)]

    @cached_property
    def peaks(self) -> Peaks:
        """amax of each (module, role, call) at each recorded step."""
        if self._history is None:
            return self._scalars(Peaks.COLUMNS, lambda tables: Peaks.of(tables, self.sites, self.steps))
        tables = [as_arrow(self._history, Peaks.COLUMNS)] if len(self._history) else []
        return Peaks.of(tables, self.sites, self.steps)

    def _scalars(self, columns: Sequence[str], use: Callable[[Iterator[pa.Table]], T]) -> T:
        return read_history(
            _directories(self.path), self._kind, columns, use,
            last=self.steps[-1] if self.steps else None, least=0 if self.times is None else int(self.times.sum()),
            damaged=self.damaged, skip_damaged=self._skip_damaged,
        )  # fmt: skip

    def __str__(self) -> str:
        steps = self.steps
        span = f"steps {steps[0]}..{steps[-1]}" if steps else "no steps"
        what = self.run.get("precision", "?")
        return f"Profile({self.path}: {len(self.modules)} modules, {len(self.sites)} sites, {span}, {what})"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from .reporting.notebook import profile_html

        return profile_html(self)


def worst_first(table: pd.DataFrame, column: str = "overflow_hi") -> pd.DataFrame:
    """The rows of `Profile.ask` with the worst values of `column` first: the smallest sqnr_db and amin_nonzero, the
    largest of everything else. Raises UsageError for an unknown column."""
    if column not in table.columns:
        raise UsageError(f"no column {column!r} to sort by; columns are {', '.join(table.columns)}")
    ascending = column in ("sqnr_db", "amin_nonzero", "module", "role")
    keys = [column] + [c for c in ("flushed", "amax") if c != column]
    return table.sort_values(keys, ascending=[ascending, *[False] * (len(keys) - 1)], kind="stable")


def _sums(path: Path, kind: str, skip_damaged: bool, damaged: list[str]) -> Totals:
    """Those of all processes. Damaged parts are raised, or named."""

    def read(parts: dict[Path, list[Path]]) -> tuple[Totals, list[str]]:
        totals, bad = Totals(), []
        for directory, paths in parts.items():
            load_totals(directory, kind, parts=paths, into=totals, damaged=bad if skip_damaged else None)
        return totals, bad

    totals, bad = of_steady_parts(_directories(path), kind, read)
    damaged += bad
    return totals


def _directories(path: Path) -> list[Path]:
    """Where parts are: the run's own directory and those of further processes."""
    return [path, *sorted(path.glob("rank-*"))]


def _parts(path: Path, kind: str, skip_damaged: bool, damaged: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """The parts of one kind, those of further ranks after those of rank 0. Damaged ones are raised, or named."""
    for part in (p for d in _directories(path) for p in list_parts(d, kind)):
        try:
            table = read_part(part, kind=kind)
        except RunDirectoryError:
            if not skip_damaged:
                raise
            damaged.append(str(part))
            continue
        yield part, table


def _merged_site(site: Site, by: str) -> Site:
    """What a site is merged into: see `Profile.merged`."""
    return site if by == "tensor" else Site(site.module, site.role, site.call if by == "site" else 0)


def _truth(parts: list[pa.Table]) -> pd.DataFrame | None:
    import pyarrow as pa

    return pa.concat_tables(parts).to_pandas().sort_values("step", kind="stable", ignore_index=True) if parts else None


def _shadow(
    path: Path, run: dict[str, Any], graph: dict[str, Any], totals: Totals, damaged: list[str], skip_damaged: bool
) -> Profile:
    """The shadow parts as a Profile, with the weights of one step."""
    ranks = [path] if run.get("merged_over") else [
        d for d in _directories(path) if any(str(p) not in damaged for p in list_parts(d, "shadow"))
    ]  # fmt: skip
    table, steps = totals.table(world=run.get("merged_over", 0)), max(len(totals.steps), 1)
    if table.weights is not None:
        table.weights /= steps * _shares(list(totals.sites), len(ranks))[:, None]
    rounded = {fmt: squares / (steps * len(ranks)) for fmt, squares in totals.squared_changes().items()}
    return Profile(path, {**run, "precision": "fp32"}, list(totals.sites), table, totals.ratios(), graph, damaged,
                   rounded=rounded, times=totals.rows, most=totals.most, _steps=sorted(totals.steps), _kind="shadow",
                   _skip_damaged=skip_damaged)  # fmt: skip


def _shares(sites: list[Site], ranks: int) -> np.ndarray:
    """By what to divide weights that were summed over R ranks whose mean loss is trained on: activations of each rank
    enter that mean with a factor 1/R, squared 1/R^2; gradients of parameters are averaged already."""
    return np.asarray([ranks if s.role is Role.WEIGHT else ranks * ranks for s in sites], float)


def _roles(roles: Iterable[str]) -> set[Role]:
    words = [roles] if isinstance(roles, str) else list(roles)
    known = [r.value for r in Role]
    for word in words:
        if word not in known:
            raise UsageError(f"unknown role {word!r}; roles are {', '.join(known)}")
    return {Role(w) for w in words}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"{path} is not JSON ({error}): move it away; the statistics load without it"
        ) from error
    return content if isinstance(content, dict) else {}
