"""Decision units: the modules that compute, what each costs, and who hands tensors to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..profiles import Profile


@dataclass(frozen=True)
class Unit:
    """A module with a precision of its own.

    name: FQN, "" for the root. type: class name. flops: of one forward pass, children not counted. elements: of its
    largest output. matmul: whether it owns a matrix that is multiplied (its operands are cast to the compute format).
    That is told from the shape of its parameters and the FLOPs, not from class names: a look-up table multiplies
    nothing. Where no FLOPs were counted at all, every owner of a matrix is taken for one that multiplies.
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
    """Units, edges between them, and groups that must agree on storage (tied weights).

    flops_known: whether FLOPs were counted. buffers: (module, local name) of the tensors that are buffers.
    """

    units: tuple[Unit, ...]
    edges: tuple[Edge, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    flops_known: bool = True
    buffers: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, profile: Profile) -> ModelGraph:
        """The graph that was recorded beside the statistics.

        Raises UsageError where the run has none (it was killed before the first flush of graph.json), or where no
        module ran while it was recorded.
        """
        content = profile.graph
        if not content.get("modules"):
            raise UsageError(
                f"{profile.path} has no graph.json: record the run again (the file is written when recording ends)"
            )
        if not any(m["calls"] > 0 for m in content["modules"]):
            raise UsageError(f"{profile.path}: no forward pass was recorded; run the model inside the with block")
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ModelGraph:
        """From the content of graph.json. Modules that never ran have no unit."""
        parameters = [p for p in content["parameters"] if not p.get("buffer", False)]
        matrices = {owner for p in parameters if len(p["shape"]) >= 2 for owner in p["owners"]}
        known = any(m["flops"] for m in content["modules"])
        units = tuple(
            Unit(
                name=m["name"],
                type=m["type"],
                flops=m["flops"],
                elements=m["elements"],
                own_params=m["own_params"],
                matmul=m["name"] in matrices and (m["flops"] > 0 or not known),
                leaf=m["leaf"],
            )
            for m in content["modules"]
            if m["calls"] > 0
        )
        names = {u.name for u in units}
        groups = tuple(
            tuple(p["owners"]) for p in content["parameters"] if len([o for o in p["owners"] if o in names]) > 1
        )
        buffers = frozenset(
            (owner, p["name"].rpartition(".")[2])
            for p in content["parameters"]
            if p.get("buffer", False)
            for owner in p["owners"]
        )
        return cls(units, _edges(content["edges"], names), groups, known, buffers)


def _edges(content: list[dict[str, Any]], names: set[str]) -> tuple[Edge, ...]:
    """Edges between units. A tensor that enters a container and goes on to a module in it is there twice, and is
    charged to the inner one."""
    inner: set[tuple[str, str, int]] = set()  # (producer, container, elements) that something in the container takes
    for e in content:
        container = e["consumer"]
        while container:
            container = container.rpartition(".")[0]
            inner.add((e["producer"], container, e["elements"]))
    return tuple(
        Edge(e["producer"], e["consumer"], e["elements"])
        for e in content
        if e["producer"] in names
        and e["consumer"] in names
        and e["producer"] != e["consumer"]
        and (is_inside(e["producer"], e["consumer"]) or (e["producer"], e["consumer"], e["elements"]) not in inner)
    )


def is_inside(name: str, container: str) -> bool:
    """Whether module `name` lies below `container`; everything but itself lies below the root."""
    return name != container and (not container or name.startswith(container + "."))
