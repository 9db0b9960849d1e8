"""Everything a page shows as tables: rows for its viewer and its CSV files, and Parquet files that it carries.

The page makes the tables of sites from its own data (see templates/tables.js); the others are given to it here, once.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..histogram import EXP_LO
from .rows import SiteRow

if TYPE_CHECKING:
    import pandas as pd

    from .view import View

PARQUET_BYTES = 2_500_000
"""What the Parquet files of a page may weigh together (a third more in the page); the largest are left out first."""
SCHEMA = 1
"""Of these tables; in the metadata of each Parquet file."""


@dataclass(frozen=True)
class Download:
    """A table of the page. says: what a row is. columns, rows: content for viewer and CSV, None where the page makes
    them itself. parquet: base64, "" where left out. size: of the Parquet file in bytes, also where left out. count:
    rows of it."""

    name: str
    says: str
    columns: tuple[str, ...] | None
    rows: list[list[Any]] | None
    parquet: str
    size: int
    count: int


def downloads(view: View, *, limit: int = PARQUET_BYTES) -> tuple[Download, ...]:
    """The tables that this page has something for, the sites first. limit: of the Parquet files together, in bytes."""
    import pandas as pd

    made: list[tuple[_Table, pd.DataFrame, bytes]] = []
    for table in _TABLES:
        frame = pd.DataFrame(table.rows(view))
        if len(frame):
            made.append((table, frame, parquet(frame, table.name)))
    room, kept = limit, set()
    for _, (table, _, data) in sorted(enumerate(made), key=lambda one: len(one[1][2])):
        if len(data) <= room:
            kept.add(table.name)
            room -= len(data)
    return tuple(
        Download(
            name=table.name,
            says=table.says,
            columns=None if table.by_page else tuple(frame.columns),
            rows=None if table.by_page else _plain(frame),
            parquet=base64.b64encode(data).decode() if table.name in kept else "",
            size=len(data),
            count=len(frame),
        )
        for table, frame, data in made
    )


def parquet(frame: pd.DataFrame, name: str) -> bytes:
    """A Parquet file of one table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({"precscope.schema": str(SCHEMA), "precscope.kind": f"report-{name}"})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True)
class _Table:
    name: str
    says: str
    rows: Callable[[View], Sequence[dict[str, Any]]] = field(repr=False)
    by_page: bool = False


def _sites(view: View) -> list[dict[str, Any]]:
    return [{**_key(s), "count": s.count, "zeros": s.zeros, "nonfinite": s.nonfinite, "amax": s.amax,
             "amin_nonzero": s.amin_nonzero, "sumsq": s.sumsq, "source": s.source,
             "source_exponent": s.source_exponent, "histogram_from": s.lo if s.histogram else EXP_LO,
             "histogram": list(s.histogram)} for s in view.sites]  # fmt: skip


def _history(view: View) -> list[dict[str, Any]]:
    return [
        {**_key(s), "step": step, "amax": amax, "nonfinite": i in broken}
        for s in view.sites
        for broken in [set(s.broken)]
        for i, (step, amax) in enumerate(zip(view.steps, s.history, strict=False))
        if amax is not None or i in broken
    ]


def _key(site: SiteRow) -> dict[str, Any]:
    return {"module": site.module, "role": site.role, "call": site.call}


def _plan(view: View) -> list[dict[str, Any]]:
    return [{"module": r.module, "type": r.type, "compute": r.compute, "policy": r.policy, "params": r.params,
             "flops_share": r.flops_share, "parameters": r.parameters, "reasons": "; ".join(r.reasons)}
            for r in view.plan]  # fmt: skip


def _beside(view: View) -> list[dict[str, Any]]:
    if view.beside is None:
        return []
    names = [c.replace(" ", "_") for c in view.beside.columns]
    return [{"figure": f.what, "how": f.how, **dict(zip(names, f.values, strict=True))} for f in view.beside.figures]


def _noise(view: View) -> list[dict[str, Any]]:
    spenders = view.beside.spenders if view.beside is not None else ()
    formats = list(dict.fromkeys(f for s in spenders for f in s.elsewhere))
    return [{"module": s.module, "compute": s.compute, "loss_noise": s.std, "share_of_plan": s.share,
             "share_of_budget": s.of_budget, **{f"loss_noise_{f}": s.elsewhere.get(f) for f in formats}}
            for s in spenders]  # fmt: skip


def _casts(view: View) -> list[dict[str, Any]]:
    return [asdict(c) for c in view.beside.casts] if view.beside is not None else []


def _runs(view: View) -> list[dict[str, Any]]:
    said = {c.run: c.against for c in view.courses}
    return [{**asdict(r), "against_baseline": said.get(r.run, "")} for r in view.runs]


def _curves(view: View) -> list[dict[str, Any]]:
    rows = []
    for course in view.courses:
        apart = {step: rest for step, *rest in course.difference}
        for step, mean, lo, hi in course.losses:
            d = apart.get(step, (None, None, None))
            rows.append({"run": course.run, "step": step, "loss": mean, "loss_lo": lo, "loss_hi": hi,
                         "difference": d[0], "difference_lo": d[1], "difference_hi": d[2]})  # fmt: skip
    return rows


def _steps(view: View) -> list[dict[str, Any]]:
    found = []
    for c in view.courses:
        pairs: list[tuple[str, int, float | None]] = [("held_out_loss", s, v) for s, v in c.held_out]
        pairs += [("loss_scale", s, v) for s, v in c.scale] + [("steps_per_second", s, v) for s, v in c.rate]
        pairs += [("skipped", s, 1.0) for s in c.skipped] + [("nonfinite", s, 1.0) for s in c.nonfinite]
        found += [{"run": c.run, "what": what, "step": step, "value": value} for what, step, value in pairs]
    return found


def _events(view: View) -> list[dict[str, Any]]:
    return [{"run": c.run, "step": e.step, "kind": e.kind, "action": e.action, "module": e.module, "op": e.op,
             "text": e.text, "plan": e.plan} for c in view.courses for e in c.events]  # fmt: skip


def _provenance(view: View) -> list[dict[str, Any]]:
    return [
        {"section": heading, "key": key, "value": value} for heading, pairs in view.provenance for key, value in pairs
    ]


_TABLES = (
    _Table("sites", "a row per recorded tensor: its statistics and exponent histogram; as CSV with the answers for the "
           "chosen format and scale", _sites, by_page=True),
    _Table("history", "largest magnitude of each tensor by step (as CSV to 1%)", _history, by_page=True),
    _Table("plan", "what each module runs in, and why", _plan),
    _Table("beside", "the plan beside autocast and fp32", _beside),
    _Table("noise", "who spends the noise budget", _noise),
    _Table("casts", "tensors that change their format between modules", _casts),
    _Table("runs", "training runs in figures", _runs),
    _Table("curves", "training losses, and differences from the baseline, by step", _curves),
    _Table("steps", "held-out loss, loss scale, throughput, skipped and non-finite steps", _steps),
    _Table("events", "what the guard saw and did", _events),
    _Table("provenance", "versions, device, seeds, commands, schema numbers", _provenance),
)  # fmt: skip


def _plain(frame: pd.DataFrame) -> list[list[Any]]:
    """Cells as JSON holds them: NaN is null, an infinity a word."""
    return [[_cell(v) for v in row] for row in frame.astype(object).itertuples(index=False, name=None)]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        if value != value:
            return None
        return value if abs(value) != float("inf") else ("inf" if value > 0 else "-inf")
    return value.item() if hasattr(value, "item") else value
