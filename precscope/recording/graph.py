"""What is known of the model beside its numbers: graph.json.

    {"schema": 1,
     "modules": [{"name", "type", "parent", "params", "own_params", "calls", "elements", "flops", "leaf"}],
     "parameters": [{"name", "shape", "dtype", "requires_grad", "buffer", "owners"}],
     "edges": [{"producer", "consumer", "elements"}]}

`flops` are those of one forward pass spent in the module itself, children not counted: counted by ps.profile, elsewhere
estimated from the weights (2 per weight and output position), attention and what is functional left out.
`elements` is the size of the largest output. `producer` is the innermost module in which the tensor came to be,
`consumer` a module that took it as input, or, where none did, the one whose own code received it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .watcher import Watcher

SCHEMA = 1


def describe(watcher: Watcher, flops: dict[str, int] | None = None) -> dict[str, Any]:
    """Content of graph.json. flops: of one pass per module; estimated from the weights where not given."""
    names = set(watcher.names.values())
    passes = max(watcher.passes, 1)
    flops = flops or {name: n // passes for name, n in watcher.flops.items()}
    modules = [_module(m, name, names, watcher, flops, passes) for m, name in watcher.names.items()]
    parameters = [
        {
            "name": ".".join(filter(None, (sites[0].module, sites[0].tensor))),
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "requires_grad": tensor.requires_grad,
            "buffer": not isinstance(tensor, nn.Parameter),
            "owners": [s.module for s in sites],
        }
        for tensor, sites in watcher.owners.items()
    ]
    edges = [{"producer": a, "consumer": b, "elements": n} for (a, b), n in watcher.edges.items()]
    return {"schema": SCHEMA, "modules": modules, "parameters": parameters, "edges": edges}


def _module(
    module: nn.Module, name: str, names: set[str], watcher: Watcher, flops: dict[str, int], passes: int
) -> dict[str, Any]:
    return {
        "name": name,
        "type": type(module).__name__,
        "parent": _parent(name, names),
        "leaf": next(module.children(), None) is None,
        "params": sum(p.numel() for p in module.parameters()),
        "own_params": sum(p.numel() for p in module.parameters(recurse=False)),
        "calls": -(-watcher.calls[name] // passes),
        "elements": watcher.elements.get(name, 0),
        "flops": int(flops.get(name, 0)),
    }


def _parent(name: str, names: set[str]) -> str | None:
    """Name of the nearest watched ancestor, None for the root."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None
