"""A recorded run, read as tables: `Profile.load("runs/a").ask("e5m2", scale_exponent=12)`.

A Profile holds, per site, the statistics summed over all recorded steps (histograms add up), and per step and site the
scalars that make a history. Any format and power-of-two scale is answered from them, without the model and without
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RunDirectoryError, UsageError, nearest
from .formats import FloatFormat, get_format
from .sites import Role, Site
from .stats import StatsTable
from .store import CHANGES, expand, read_part

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from .opstore import OpRecords

_SCALARS = ("count", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq", "loss_scale")


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
    change of the loss when the tensor is really rounded, float64[sites], NaN but for parameters.
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
    _history: pd.DataFrame | None = field(default=None, repr=False)

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
        reader, shadow, truth = _Reader(world), _Reader(world), []
        for _, table in _parts(path, "stats", skip_damaged, damaged):
            reader.add(table)
        for part, table in _parts(path, "shadow", skip_damaged, damaged):
            shadow.add(table, rank="" if world or part.parent == path else part.parent.name)
        for _, table in _parts(path, "truth", skip_damaged, damaged):
            truth.append(table)
        if not run and not reader.sites:
            raise RunDirectoryError(
                f"{path} holds no recorded run: record one with precscope profile TASK --out {path}"
            )
        table, ratios = reader.merged()
        graph = _read_json(path / "graph.json")
        priced = shadow.shadow_profile(path, run, graph)
        return cls(path, run, list(reader.sites), table, ratios, graph, damaged, priced, _truth(truth),
                   _history=reader.history())  # fmt: skip

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have statistics, in the order of recording."""
        return list(dict.fromkeys(s.module for s in self.sites))

    @property
    def steps(self) -> list[int]:
        """Recorded steps, ascending."""
        return sorted(self.history().step.unique().tolist()) if self._history is not None else []

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

    def history(self) -> pd.DataFrame:
        """A row per (step, site): step, module, role, call, tensor, source, count, zeros, pos_inf, neg_inf, nan, amax,
        amin_nonzero, sum, sumsq, loss_scale. Gradients have the loss scale divided out already."""
        assert self._history is not None
        return self._history

    def __str__(self) -> str:
        steps = self.steps
        span = f"steps {steps[0]}..{steps[-1]}" if steps else "no steps"
        what = self.run.get("precision", "?")
        return f"Profile({self.path}: {len(self.modules)} modules, {len(self.sites)} sites, {span}, {what})"

    def __repr__(self) -> str:
        return str(self)


def worst_first(table: pd.DataFrame, column: str = "overflow_hi") -> pd.DataFrame:
    """The rows of `Profile.ask` with the worst values of `column` first: the smallest sqnr_db and amin_nonzero, the
    largest of everything else. Raises UsageError for an unknown column."""
    if column not in table.columns:
        raise UsageError(f"no column {column!r} to sort by; columns are {', '.join(table.columns)}")
    ascending = column in ("sqnr_db", "amin_nonzero", "module", "role")
    keys = [column] + [c for c in ("flushed", "amax") if c != column]
    return table.sort_values(keys, ascending=[ascending, *[False] * (len(keys) - 1)], kind="stable")


def _parts(path: Path, kind: str, skip_damaged: bool, damaged: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """The parts of one kind, those of further ranks after those of rank 0. Damaged ones are raised, or named."""
    for part in sorted(path.glob(f"{kind}-*.parquet")) + sorted(path.glob(f"rank-*/{kind}-*.parquet")):
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


class _Reader:
    """Sums parts into one row per site, and keeps the scalars of every step. world: see Profile.load."""

    def __init__(self, world: int = 0) -> None:
        self._world_exponent = max(world, 1).bit_length() - 1
        self.sites: dict[Site, int] = {}
        self._tables: list[StatsTable] = []
        self._rows = 0
        self._keys: list[np.ndarray] = []
        self._ratios: dict[int, tuple[np.ndarray, int, int]] = {}
        self._scalars: list[pa.Table] = []
        self._ranks: set[str] = set()
        self._squares: dict[str, dict[int, float]] = {fmt: {} for fmt in CHANGES}

    def add(self, part: pa.Table, *, rank: str = "") -> None:
        """rank: whose part it is, for shadow parts: their weights are averaged."""
        self._ranks.add(rank)
        column = {name: part.column(name).combine_chunks() for name in part.column_names}
        key = zip(*(column[n].to_pylist() for n in ("module", "role", "call", "tensor")), strict=True)
        index = [self.sites.setdefault(Site(m, Role(r), c, t), len(self.sites)) for m, r, c, t in key]
        keys = np.asarray(index, np.int64)
        table = StatsTable(
            counts=expand(column["hist_lo"].to_numpy(zero_copy_only=False), column["hist"]),
            **{n: column[n].to_numpy(zero_copy_only=False) for n in _SCALARS if n not in ("count", "loss_scale")},
            source=column["source"].to_pylist(),
            source_exponent=self._source_exponents(column),
            weights=_weights(column) if "weights" in column else None,
        )
        unique, inverse = np.unique(keys, return_inverse=True)
        self._tables.append(table.group(inverse, len(unique)))
        self._keys.append(unique)
        self._rows += len(unique)
        if self._rows > 4 * len(self.sites) + 4096:
            self._collapse()
        self._add_ratios(keys, column)
        for fmt, squares in self._squares.items():
            if f"change_{fmt}" in column:
                for site, change in zip(index, column[f"change_{fmt}"].to_pylist(), strict=True):
                    if change is not None:
                        squares[site] = squares.get(site, 0.0) + change * change
        self._scalars.append(part.select(["step", "module", "role", "call", "tensor", "source", *_SCALARS]))

    def _source_exponents(self, column: dict[str, pa.Array]) -> np.ndarray:
        """By which powers of two values were multiplied since they were seen: what was divided out of gradients."""
        scale = 1 - np.frexp(column["loss_scale"].to_numpy(zero_copy_only=False))[1].astype(np.int64)
        gradient = np.asarray([Role(role).is_gradient for role in column["role"].to_pylist()], np.int64)
        return scale - self._world_exponent * gradient

    def _add_ratios(self, keys: np.ndarray, column: dict[str, pa.Array]) -> None:
        rows = np.flatnonzero(column["ratio_unchanged"].is_valid().to_numpy(zero_copy_only=False))
        if not len(rows):
            return
        counts = expand(column["ratio_lo"].take(rows).to_numpy(zero_copy_only=False), column["ratio"].take(rows))
        unchanged = column["ratio_unchanged"].take(rows).to_pylist()
        from_zero = column["ratio_from_zero"].take(rows).to_pylist()
        for i, row in enumerate(rows):
            site = int(keys[row])
            before = self._ratios.get(site)
            now = (counts[i], unchanged[i], from_zero[i])
            self._ratios[site] = now if before is None else tuple(a + b for a, b in zip(before, now, strict=True))  # type: ignore[assignment]

    def _collapse(self) -> None:
        table = StatsTable.concat(self._tables)
        self._tables = [table.group(np.concatenate(self._keys), len(self.sites))]
        self._keys = [np.arange(len(self.sites))]
        self._rows = len(self.sites)

    def merged(self) -> tuple[StatsTable, dict[int, tuple[np.ndarray, int, int]]]:
        if not self._tables:
            return StatsTable.empty(0), {}
        self._collapse()
        return self._tables[0], self._ratios

    def shadow_profile(self, path: Path, run: dict[str, Any], graph: dict[str, Any]) -> Profile | None:
        """The shadow parts as a Profile, with the weights of one step; None where there were none."""
        if not self.sites:
            return None
        table, ratios = self.merged()
        history = self.history()
        if table.weights is not None:
            table.weights /= history.step.nunique() * self._shares(list(self.sites))[:, None]
        runs = history.step.nunique() * len(self._ranks)
        rounded = {
            fmt: np.asarray([squares.get(i, np.nan) / runs for i in range(len(self.sites))])
            for fmt, squares in self._squares.items()
        }
        return Profile(path, {**run, "precision": "fp32"}, list(self.sites), table, ratios, graph, rounded=rounded,
                       _history=history)  # fmt: skip

    def _shares(self, sites: list[Site]) -> np.ndarray:
        """By what to divide weights that were summed over R ranks whose mean loss is trained on: activations of each
        rank enter that mean with a factor 1/R, squared 1/R^2; gradients of parameters are averaged already."""
        ranks = len(self._ranks)
        return np.asarray([ranks if s.role is Role.WEIGHT else ranks * ranks for s in sites], float)

    def history(self) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        if not self._scalars:
            return pd.DataFrame(columns=["step", "module", "role", "call", "tensor", "source", *_SCALARS])
        table = pa.concat_tables(self._scalars).unify_dictionaries()
        return table.to_pandas()


def _weights(column: dict[str, pa.Array]) -> np.ndarray:
    """float64 [rows, BINS], NaN where null."""
    weights = expand(column["weights_lo"].to_numpy(zero_copy_only=False), column["weights"], np.float64)
    weights[column["weights"].is_null().to_numpy(zero_copy_only=False)] = np.nan
    return weights


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
