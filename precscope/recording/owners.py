"""Who owns what: the modules that are watched, and the parameters and buffers that belong to them."""

from __future__ import annotations

import torch
from torch import nn

from ..sites import Role, Site

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def watched_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that compute or own parameters, with their first name: the root, and all others but pure containers,
    whose tensors are their children's. A shared module appears once. Modules compiled by torch.jit.script take no
    hooks: they are part of the module around them."""
    return {
        m: name
        for name, m in model.named_modules()
        if not isinstance(m, torch.jit.ScriptModule)
        and (not name or type(m) not in _CONTAINERS or next(m.parameters(recurse=False), None) is not None)
    }


def parameter_owners(names: dict[nn.Module, str]) -> dict[torch.Tensor, list[Site]]:
    """Parameters and floating buffers -> the weight sites of every module that owns them (several where tied)."""
    owners: dict[torch.Tensor, list[Site]] = {}
    for module, name in names.items():
        for local, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point():
                owners.setdefault(tensor, []).append(Site(name, Role.WEIGHT, 0, local))
    return owners


def sharded_parameters(owners: dict[torch.Tensor, list[Site]]) -> dict[str, dict[str, list[Site]]]:
    """Module -> its own parameters that are distributed tensors -> the gradient sites of all that own them."""
    found: dict[str, dict[str, list[Site]]] = {}
    for tensor, sites in owners.items():
        if hasattr(tensor, "placements") and isinstance(tensor, nn.Parameter):
            for site in sites:
                gradients = [s._replace(role=Role.GRAD_WEIGHT) for s in sites]
                found.setdefault(site.module, {})[site.tensor] = gradients
    return found
