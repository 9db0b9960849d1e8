"""The plan beside plain autocast and fp32, in figures: FLOPs, casts, time, memory, noise, and who spends the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..formats import get_format
from ..profiles import Profile
from .material import FORWARD, Material, known
from .numbers import bytes_text, count_text, figure, number, percent

if TYPE_CHECKING:
    from ..advice.noise import Noise
    from ..advice.units import ModelGraph
    from ..comparison import RunRow
    from ..plans import PrecisionPlan

_NOISE_SHARE = 0.3  # of the spread over batches, where the plan does not say its own
_LISTED = 12  # spenders and casts that a page lists; downloads have all


@dataclass(frozen=True)
class Figure:
    """One line of the table: what, how it is known, and a text per column ("–" where it is not known). values: the same
    as numbers, None where not known."""

    what: str
    how: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Spender:
    """A module's part of the noise that the plan makes. std: standard deviation of a step's loss. share: of the plan's
    variance. of_budget: of the variance that is allowed, None where no budget is known. elsewhere: format -> the same
    standard deviation, were the module in it."""

    module: str
    compute: str
    std: float
    share: float
    of_budget: float | None
    elsewhere: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CastRow:
    """A tensor that changes its format on the way between two modules; elements per forward pass."""

    producer: str
    consumer: str
    before: str
    after: str
    elements: int


@dataclass(frozen=True)
class Beside:
    """columns: "plan", "fp16 autocast", "bf16 autocast", "fp32" (those that anything is known of). figures: the lines.
    spenders: all modules that spend noise, largest first; noise, budget: standard deviations, NaN where not known.
    casts: all of them, largest first. says: the plan in one sentence, by who made it."""

    columns: tuple[str, ...]
    figures: tuple[Figure, ...]
    spenders: tuple[Spender, ...] = ()
    noise: float = float("nan")
    budget: float = float("nan")
    casts: tuple[CastRow, ...] = ()
    says: str = ""

    @property
    def listed(self) -> tuple[Spender, ...]:
        """The spenders that a page shows."""
        return self.spenders[:_LISTED]

    @property
    def listed_casts(self) -> tuple[CastRow, ...]:
        """The casts that a page shows."""
        return self.casts[:_LISTED]


def beside(material: Material) -> Beside | None:
    """None without a plan. A run without its graph knows less: those lines are left out."""
    from ..advice.units import ModelGraph

    plan = material.plan
    if plan is None:
        return None
    try:
        graph = ModelGraph.of(material.profile)
    except (UsageError, KeyError):  # none, or one that another tool wrote with less in it
        graph = ModelGraph((), ())
    made_from = dict(plan.made_from or {})
    columns = _columns(material, made_from)
    noise = _noise(material.profile, graph, columns, made_from)
    chosen = {c: _chosen(c, plan, graph) for c in columns}
    found = _casts(plan, graph)
    lines = [
        *_modules(material, columns, graph),
        _line("Casts between modules", "per forward pass", columns, {"plan": len(found)}, str, others=0.0)
        if graph.edges
        else None,
        _line("Elements cast", "between modules, per forward pass", columns,
              {"plan": sum(c.elements for c in found)}, count_text, others=0.0) if graph.edges else None,
        _line("Elements cast", "counted in a step, inside modules too", columns,
              _cast_in_all(made_from, every=not material.high), count_text),
        _line("Time of forward and backward, ms", _how(made_from), columns,
              _autocast_keys(made_from.get("predicted_ms") or {}), figure),
        _line("Time of forward and backward, ms", "measured side by side", columns, _step_ms(made_from), figure),
        _line("Time of forward and backward, ms", "measured in turn, the plan without autocast", columns,
              _cast_ms(made_from, every=not material.high), figure),
        _line("Time per training step, ms", "measured in the runs below", columns,
              _of_runs(material.runs, "step_time_ms"), figure),
        *_memory(columns, chosen, plan, graph, material.runs),
        _line("Loss noise, standard deviation", "predicted from shadow steps", columns,
              {c: _std(noise, chosen[c]) for c in columns} if noise.variance else {}, number),
        _overflows(material, columns),
        _line("Held-out loss", "measured in the runs below", columns, _of_runs(material.runs, "eval_loss"), figure),
        _line("Skipped steps", "in the runs below", columns, _of_runs(material.runs, "skipped_steps"), number),
        _line("Non-finite steps", "in the runs below", columns, _of_runs(material.runs, "nonfinite_steps"), number),
    ]  # fmt: skip
    figures = tuple(line for line in lines if line is not None and any(v is not None for v in line.values))
    std = _std(noise, chosen["plan"])
    budget = math.sqrt(noise.budget) if math.isfinite(noise.budget) else float("nan")
    said = str(made_from.get("says") or "")
    return Beside(columns, figures, _spenders(noise, chosen["plan"], columns), std, budget, found, said)


def _columns(material: Material, made_from: Mapping[str, Any]) -> tuple[str, ...]:
    """The plan, autocast in the 16-bit formats that were in question or were trained with, and fp32."""
    asked = set(made_from.get("formats") or ()) | {r.precision for r in material.runs} | {
        f.name for f in material.formats
    }  # fmt: skip
    return ("plan", *(f"{f} autocast" for f in ("fp16", "bf16") if f in asked), "fp32")


def _format(column: str) -> str:
    return column.removesuffix(" autocast")


def _autocast_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by format as figures by column."""
    return {(f"{k} autocast" if k in ("fp16", "bf16") else k): v for k, v in values.items()}


def _line(
    what: str, how: str, columns: Sequence[str], found: Mapping[str, Any], text: Any, *, others: float | None = None
) -> Figure:
    """others: the value of the columns that `found` does not name."""
    values = []
    for column in columns:
        value = found.get(column, others)
        values.append(float(value) if isinstance(value, int | float) and known(float(value)) else None)
    shown = [("–" if v is None else text(int(v)) if text is str else text(v)) for v in values]
    return Figure(what, how, tuple(shown), tuple(values))


def _chosen(column: str, plan: PrecisionPlan, graph: ModelGraph) -> dict[str, str]:
    """module -> compute format."""
    names = [u.name for u in graph.units]
    if column == "plan":
        return {name: layer.compute for name, layer in plan.resolve(names).items()}
    return dict.fromkeys(names, _format(column))


def _modules(material: Material, columns: Sequence[str], graph: ModelGraph) -> list[Figure]:
    total = len(material.rows)
    low = {c: 0.0 if c == "fp32" else float(total) for c in columns} | {"plan": float(len(material.low))}
    share = {c: 0.0 if c == "fp32" else 1.0 for c in columns} | {"plan": material.low_share}
    counted = material.low_share is not None
    return [
        _line("Modules in low precision", f"of {total}", columns, low, str),
        _line("Forward FLOPs in low precision, %", "counted", columns, share if counted else {}, percent),
    ]


def _how(made_from: Mapping[str, Any]) -> str:
    measured = made_from.get("costs") == "measured"
    return "predicted from measured module times" if measured else "predicted by a cost model: relative only"


def _step_ms(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Times of whole steps. A plan that does without autocast was not timed among them, see `_cast_ms`."""
    found = dict(made_from.get("step_ms") or {})
    main = str(made_from.get("main") or "")
    if "main" in found and main:
        found[main] = found.pop("main")
    if beyond_autocast(made_from):
        found.pop("plan", None)
    return _autocast_keys(found)


def beyond_autocast(made_from: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was measured of doing without autocast, where the plan does; {} elsewhere."""
    beyond = made_from.get("beyond_autocast")
    return beyond if isinstance(beyond, Mapping) and beyond.get("taken") else {}


def _cast_ms(made_from: Mapping[str, Any], *, every: bool) -> dict[str, Any]:
    """The plan against the one it was made from; that is plain autocast where every module runs low."""
    found = beyond_autocast(made_from)
    base = {f"{made_from.get('main')} autocast": found.get("ms_autocast")} if every else {}
    return {"plan": found.get("ms_cast"), **base} if found else {}


def _cast_in_all(made_from: Mapping[str, Any], *, every: bool) -> dict[str, Any]:
    """As `_cast_ms`, of a plan that casts all it can: the counts of others were not kept."""
    found = beyond_autocast(made_from)
    if found.get("variant") != "cast" or found.get("kept"):
        return {}
    counted = found.get("cast_elements") or {}
    base = {f"{made_from.get('main')} autocast": counted.get("autocast")} if every else {}
    return {"plan": counted.get("cast"), **base}


def _of_runs(runs: Sequence[RunRow], name: str) -> dict[str, Any]:
    """The figure `name` of the first run of each precision."""
    return _autocast_keys({r.precision: getattr(r, name) for r in reversed(runs)})


def _memory(
    columns: Sequence[str],
    chosen: Mapping[str, Mapping[str, str]],
    plan: PrecisionPlan,
    graph: ModelGraph,
    runs: Sequence[RunRow],
) -> list[Figure]:
    """Predicted: parameters as they are stored, and what leaf modules put out, in their format (an 8-bit product is put
    out in 16 bits). Measured: the peak of a run."""
    parameters = {c: sum(u.own_params for u in graph.units) * 4.0 for c in columns}
    stored = plan.resolve([u.name for u in graph.units])
    parameters["plan"] = sum(u.own_params * get_format(stored[u.name].params).bits / 8 for u in graph.units)
    outputs = {
        c: sum(u.elements * max(get_format(chosen[c][u.name]).bits, 16) / 8 for u in graph.units if u.leaf)
        for c in columns
    }
    some = any(u.elements for u in graph.units)
    peaks = _of_runs(runs, "peak_memory_bytes")
    return [
        _line("Memory of parameters", "predicted, as stored", columns, parameters if graph.units else {}, bytes_text),
        _line("Memory of activations", "predicted: outputs of leaf modules", columns, outputs if some else {},
              bytes_text),
        _line("Peak memory", "measured in the runs below", columns, peaks, bytes_text),
    ]  # fmt: skip


def _overflows(material: Material, columns: Sequence[str]) -> Figure:
    """Forward tensors of modules that compute in a 16-bit format and go beyond its end; an 8-bit one has a scale."""
    asked = {f: material.profile.ask(f, roles=FORWARD) for f in ("fp16", "bf16")}
    total = max((len(a) for a in asked.values()), default=0)
    found: dict[str, float] = {}
    for column in columns:
        if column == "plan":
            of = {f: {r.module for r in material.rows if r.compute == f} for f in asked}
            found[column] = sum(int((a[a.module.isin(of[f])].overflow_hi > 0).sum()) for f, a in asked.items())
        elif column != "fp32":
            found[column] = int((asked[_format(column)].overflow_hi > 0).sum())
        else:
            found[column] = 0
    line = _line("Forward tensors beyond the format's end", f"of {total} recorded", columns, found, str)
    return line if total else _line("", "", columns, {}, str)


# noise


def _noise(profile: Profile, graph: ModelGraph, columns: Sequence[str], made_from: Mapping[str, Any]) -> Noise:
    """Prices of the formats in question; the budget is the plan's own where it says one."""
    from dataclasses import replace

    from ..advice.noise import Noise

    formats = dict.fromkeys([*(made_from.get("formats") or ()), *map(_format, columns)])
    names = [f for f in formats if f not in ("plan", "fp32", "fp64", "tf32")]
    share = (made_from.get("limits") or {}).get("noise")
    noise = Noise.of_run(profile, graph, names, share=float(share) if known(share) else _NOISE_SHARE)
    budget = (made_from.get("loss_noise") or {}).get("budget")
    return replace(noise, budget=float(budget) ** 2) if budget and known(budget) else noise


def _std(noise: Noise, chosen: Mapping[str, str]) -> float:
    return noise.std(dict(chosen)) if noise.variance else float("nan")


def _spenders(noise: Noise, chosen: Mapping[str, str], columns: Sequence[str]) -> tuple[Spender, ...]:
    spent = {u: noise.of(u, f) for u, f in chosen.items()}
    total = sum(spent.values())
    ordered = sorted((u for u, v in spent.items() if v > 0), key=lambda u: -spent[u])
    others = [_format(c) for c in columns if c.endswith("autocast")]
    budget = noise.budget if math.isfinite(noise.budget) else None
    return tuple(
        Spender(
            u, chosen[u], math.sqrt(spent[u]), spent[u] / total, spent[u] / budget if budget else None,
            {f: math.sqrt(noise.of(u, f)) for f in others if (u, f) in noise.variance},
        )
        for u in ordered
    )  # fmt: skip


def _casts(plan: PrecisionPlan, graph: ModelGraph) -> tuple[CastRow, ...]:
    """Largest first; what the root takes and returns is cast or not outside the model."""
    from ..plans.edges import casts

    inner = [e for e in graph.edges if e.producer and e.consumer]
    sizes: dict[tuple[str, str], int] = {}
    for e in inner:
        sizes[e.producer, e.consumer] = sizes.get((e.producer, e.consumer), 0) + e.elements
    found = casts(plan, sizes)
    rows = [CastRow(c.producer, c.consumer, c.before, c.after, sizes[c.producer, c.consumer]) for c in found]
    return tuple(sorted(rows, key=lambda r: -r.elements))
