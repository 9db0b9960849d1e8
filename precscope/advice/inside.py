"""What modules hide between their inputs and outputs: ops whose fp32 results a format could not hold.

A suspicion, not a verdict: the code may cast to fp32 just there (norms do), or not mind an infinity (a softmax of
-inf). Confirmation on the model decides; a plan that is only predicted says what it has not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..formats import FloatFormat
from ..plans import Reason
from ..profiles import Profile
from .units import ModelGraph

_MOST = 2  # ops per module that are worth a word
_ON_PURPOSE = ("masked_fill", "where", "full", "full_like", "scalar_tensor", "fill", "copy", "zeros", "triu", "tril")


def hidden_overflows(
    profile: Profile, graph: ModelGraph, fmt: FloatFormat, *, policy: str
) -> Iterator[tuple[str, Reason]]:
    """(unit, doubt) for forward ops inside units whose results pass the end of `fmt`, the largest first.

    Ops that autocast runs in fp32 on the run's device are left out, as are those of masks. Nothing where the run has
    no op-level rows.
    """
    from ..emulation.autocast import entry_of

    records = profile.ops
    if records is None:
        return
    rows = records.merged()
    units = {u.name for u in graph.units}
    device = "cuda" if profile.run.get("device") == "cuda" else "cpu"
    told: dict[str, int] = {}
    for i in np.argsort(-rows.table.amax, kind="stable"):
        site, amax = rows.sites[i], float(rows.table.amax[i])
        if not fmt.overflows(amax):
            return
        name = site.op.partition("[")[0]
        if site.phase != "forward" or site.module not in units or name.rstrip("_") in _ON_PURPOSE:
            continue
        if policy == "autocast" and entry_of(name, device) == "fp32":
            continue
        told[site.module] = told.get(site.module, 0) + 1
        if told[site.module] > _MOST:
            continue
        made = f" from values up to {rows.input_amax[i]:.4g}" if rows.input_amax[i] == rows.input_amax[i] else ""
        text = (
            f"inside it aten.{site.op} makes values up to {amax:.4g}{made} in fp32, {fmt} ends at {fmt.max:g}: whether "
            f"that op runs in {fmt} and does harm shows when the plan is tried on the model (--task)"
        )
        numbers = {"amax": amax, "limit": fmt.max}
        yield site.module, Reason(code="inside", text=text, site=None, numbers=numbers)
