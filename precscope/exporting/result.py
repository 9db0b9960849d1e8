"""What ps.export returns."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from ..reporting.numbers import bytes_text, number, plural


@dataclass(frozen=True)
class Exported:
    """A file that was written. kind: "pt2" or "onnx". casts: conversions in the graph by the dtype they lead to.
    regions: autocast regions kept whole in the graph, which cast inside. weights: bytes of weights by dtype. checked:
    what ran the file, "" where nothing did. equal: whether it returned what the planned model returns, bit for bit;
    relative_l2: the relative error against that; both None where nothing ran it. notes: what else to know."""

    path: Path
    kind: str
    casts: dict[str, int]
    regions: int
    weights: dict[str, int]
    checked: str
    equal: bool | None
    relative_l2: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        weights = ", ".join(f"{bytes_text(n)} {dtype}" for dtype, n in self.weights.items()) or "none"
        casts = ", ".join(f"{n} to {dtype}" for dtype, n in self.casts.items()) or "none"
        regions = f"; {plural(self.regions, 'autocast region')}" if self.regions else ""
        lines = [f"{self.path}: weights {weights}; casts: {casts}{regions}"]
        if self.equal:
            lines.append(f"run by {self.checked}: equal to the planned model, bit for bit")
        elif self.checked:
            lines.append(f"run by {self.checked}: relative difference {number(self.relative_l2)} to the planned model")
        return "\n".join(p for line in [*lines, *self.notes] for p in textwrap.wrap(line, 80, subsequent_indent="  "))
