"""Decision units: the modules that compute, what each costs, and who hands tensors to whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..profiles import Profile

# Types whose matrix product casts its operands to the low format under autocast. Told from the weight's shape and the
# FLOPs, not from names: a look-up table multiplies nothing.


@dataclass(frozen=True)
class Unit:
    """A module with a precision of its own.

    name: FQN. type: class name. flops: of one forward pass, children not counted. elements: of its largest output.
    matmul: whether it owns a matrix that is multiplied (its operands are cast to the compute format).
    """

    name: str
    type: str
    flops: int = 0
    elements: int = 0
    own_params: int = 0
    matmul: bool = False
    leaf: bool = True


@dataclass(frozen=True)
class Edge:
    """A tensor that one unit makes and another takes: `elements` per pass; a cast where their formats differ."""

    producer: str
    consumer: str
    elements: int


@dataclass(frozen=True)
class ModelGraph:
    """Units, edges between them, and groups that must agree on storage (tied weights)."""

    units: tuple[Unit, ...]
    edges: tuple[Edge, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    types: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, profile: Profile) -> ModelGraph:
        """The graph that was recorded beside the statistics.

        Raises UsageError where the run has none (it was killed before the first flush of graph.json).
        """
        content = profile.graph
        if not content.get("modules"):
            raise UsageError(
                f"{profile.path} has no graph.json: record the run again (the file is written when recording ends)"
            )
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelGraph:
        """From the content of graph.json. Modules that never ran have no unit; the root has none unless it is alone."""
        matrices = {owner for p in content["parameters"] if len(p["shape"]) >= 2 for owner in p["owners"]}
        ran = [m for m in content["modules"] if m["calls"] > 0]
        units = tuple(
            Unit(
                name=m["name"],
                type=m["type"],
                flops=m["flops"],
                elements=m["elements"],
                own_params=m["own_params"],
                matmul=m["name"] in matrices and m["flops"] > 0,
                leaf=m["leaf"],
            )
            for m in ran
            if m["name"] or len(ran) == 1
        )
        names = {u.name for u in units}
        edges = tuple(
            Edge(e["producer"], e["consumer"], e["elements"])
            for e in content["edges"]
            if e["producer"] in names and e["consumer"] in names and e["producer"] != e["consumer"]
        )
        groups = tuple(
            tuple(p["owners"]) for p in content["parameters"] if len([o for o in p["owners"] if o in names]) > 1
        )
        return cls(units, edges, groups, Counter(u.type for u in units))
