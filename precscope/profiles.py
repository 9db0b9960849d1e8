"""A recorded run, read as tables: `Profile.load("runs/a").ask("e5m2", scale_exponent=12)`.

A Profile holds, per site, the statistics summed over all recorded steps (histograms add up), and per step and site the
scalars that make a history. Any format and power-of-two scale is answered from them, without the model and without
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RunDirectoryError, UsageError, nearest
from .formats import FloatFormat, get_format
from .sites import Role, Site
from .stats import StatsTable
from .store import expand, read_part

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_SCALARS = ("count", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq", "loss_scale")


@dataclass
class Profile:
    """Statistics of one recorded run.

    path: the run directory. run: content of run.json. sites: one Site per row of `table`. table: statistics summed over
    steps. ratios: site index -> (histogram of floor(log2|dw|) - floor(log2|w|) int64[BINS], unchanged, from zero).
    graph: content of graph.json ({} where absent). damaged: parts that were skipped.
    """

    path: Path
    run: dict[str, Any]
    sites: list[Site]
    table: StatsTable
    ratios: dict[int, tuple[np.ndarray, int, int]]
    graph: dict[str, Any] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
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
        reader = _Reader()
        damaged = []
        for part in sorted(path.glob("stats-*.parquet")) + sorted(path.glob("rank-*/stats-*.parquet")):
            try:
                reader.add(read_part(part))
            except RunDirectoryError:
                if not skip_damaged:
                    raise
                damaged.append(str(part))
        run = _read_json(path / "run.json")
        if not run and not reader.sites:
            raise RunDirectoryError(
                f"{path} holds no recorded run: record one with precscope profile TASK --out {path}"
            )
        table, ratios = reader.merged()
        return cls(path, run, list(reader.sites), table, ratios, _read_json(path / "graph.json"), damaged,
                   reader.history())  # fmt: skip

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

    def merged(self, by: str = "site") -> tuple[list[Site], StatsTable]:
        """Sites and their statistics; by="site" merges the tensors of one (module, role, call), by="tensor" does not,
        by="module" also merges the calls."""
        if by == "tensor":
            return self.sites, self.table
        if by not in ("site", "module"):
            raise UsageError(f"by must be 'site', 'tensor' or 'module', not {by!r}")
        keys: dict[Site, int] = {}
        index = [keys.setdefault(Site(s.module, s.role, s.call if by == "site" else 0), len(keys)) for s in self.sites]
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
        deviation of the loss change; NaN where not priced).

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
        return pd.DataFrame(columns | table.ask(fmt, scale_exponent=scale_exponent))

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


class _Reader:
    """Sums parts into one row per site, and keeps the scalars of every step."""

    def __init__(self) -> None:
        self.sites: dict[Site, int] = {}
        self._tables: list[StatsTable] = []
        self._rows = 0
        self._keys: list[np.ndarray] = []
        self._ratios: dict[int, tuple[np.ndarray, int, int]] = {}
        self._scalars: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        column = {name: part.column(name).combine_chunks() for name in part.column_names}
        key = zip(*(column[n].to_pylist() for n in ("module", "role", "call", "tensor")), strict=True)
        index = [self.sites.setdefault(Site(m, Role(r), c, t), len(self.sites)) for m, r, c, t in key]
        keys = np.asarray(index, np.int64)
        table = StatsTable(
            counts=expand(column["hist_lo"].to_numpy(zero_copy_only=False), column["hist"]),
            **{n: column[n].to_numpy(zero_copy_only=False) for n in _SCALARS if n not in ("count", "loss_scale")},
            source=column["source"].to_pylist(),
            source_exponent=1 - np.frexp(column["loss_scale"].to_numpy(zero_copy_only=False))[1].astype(np.int64),
        )
        unique, inverse = np.unique(keys, return_inverse=True)
        self._tables.append(table.group(inverse, len(unique)))
        self._keys.append(unique)
        self._rows += len(unique)
        if self._rows > 4 * len(self.sites) + 4096:
            self._collapse()
        self._add_ratios(keys, column)
        self._scalars.append(part.select(["step", "module", "role", "call", "tensor", "source", *_SCALARS]))

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

    def history(self) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        if not self._scalars:
            return pd.DataFrame(columns=["step", "module", "role", "call", "tensor", "source", *_SCALARS])
        table = pa.concat_tables(self._scalars).unify_dictionaries()
        return table.to_pandas()


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
