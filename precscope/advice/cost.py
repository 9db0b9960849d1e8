"""What a forward and backward pass of each unit costs in each format: measured (measurement.py) where the run has
cost.parquet, else FLOPs over a matmul rate plus bytes over a bandwidth, and the table says "model".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats import get_format
from ..store import replacing
from .units import ModelGraph

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

_FLOPS, _BANDWIDTH, _CAST_BYTES = 1e12, 1e11, 6.0  # of the model: FLOP/s in fp32, byte/s, bytes per element cast
_LAUNCH_MS = 0.005  # of one small operation beside the bytes it moves
LEAST_GAIN_MS = 0.1  # per step: less is lost again in entering autocast, scaling the loss and the timer's noise


@dataclass(frozen=True)
class CostTable:
    """ms per unit and format (forward and backward of one pass), and of casting one element.

    least_gain_ms: what a plan must gain over fp32 per step.
    how: (unit, format) -> "measured", "emulated" (not native here: no faster than fp32), or "model".
    """

    time_ms: dict[tuple[str, str], float]
    how: dict[tuple[str, str], str]
    cast_ms_per_element: float
    cast_ms: float = 0.0
    least_gain_ms: float = 0.0

    def cast(self, elements: int) -> float:
        """Cost of casting `elements` there and their gradient back, in ms."""
        return 2 * (self.cast_ms + elements * self.cast_ms_per_element)

    @classmethod
    def of(cls, table: pd.DataFrame | None, graph: ModelGraph, formats: Sequence[str]) -> CostTable:
        """Measured where cost.parquet has the unit and format; a format that it lacks is emulated on that device and
        takes fp32's time; modelled where there is no measurement of the unit.

        What a module with children but no matrix of its own does beside them runs in the dtypes that they hand it,
        whatever autocast says, and its time is the difference of two large ones: every format is given the least of
        them. (Attention between bf16 projections, timed alone in fp32, looked faster there and made plans slower.) The
        model has no word on what the root does beside the others either: without FLOPs it costs nothing.
        """
        time_ms: dict[tuple[str, str], float] = {}
        how: dict[tuple[str, str], str] = {}
        measured_any = table is not None and len(table) > 0
        cast = _CAST_BYTES / _BANDWIDTH * 1e3
        if measured_any:
            cast = float(table.cast_ms_per_element.iloc[0])
            for row in table.itertuples():
                time_ms[row.module, row.format] = row.time_ms
                how[row.module, row.format] = "measured"
        for unit in graph.units:
            measured = {f: time_ms[unit.name, f] for f in formats if (unit.name, f) in time_ms}
            idle = not unit.leaf and not unit.matmul
            for fmt in formats:
                key = unit.name, fmt
                if not measured:
                    nothing = idle and not unit.flops and not unit.name and len(graph.units) > 1
                    time_ms[key], how[key] = 0.0 if nothing else _modelled(unit.flops, unit.elements, fmt), "model"
                    continue
                if fmt not in measured:
                    time_ms[key], how[key] = measured.get("fp32", max(measured.values())), "emulated"
                if idle:
                    time_ms[key] = min(measured.values())
        if not measured_any:
            return cls(time_ms, how, cast)
        return cls(time_ms, how, cast, cast_ms=_LAUNCH_MS, least_gain_ms=LEAST_GAIN_MS)


def _modelled(flops: int, elements: int, fmt: str) -> float:
    """FLOP/byte model of a device whose low-precision units are twice as fast per halving of the width: relative costs
    only. Forward and backward: three times the forward's FLOPs, six passes over the output."""
    bytes_each = max(get_format(fmt).bits, 8) / 8
    return (3 * flops * bytes_each / 4 / _FLOPS + 6 * elements * bytes_each / _BANDWIDTH) * 1e3


def save(table: pd.DataFrame, path: Path) -> None:
    """Write cost.parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({"precscope.schema": "1", "precscope.kind": "cost"})
    with replacing(path) as temporary:
        pq.write_table(arrow, temporary)
