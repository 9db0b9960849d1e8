"""The processes of a launch find out whether they record one run together, before any of them waits in a collective.

Each leaves a note in the store that torch.distributed was started with, and reads those of the others: who is there,
the run directory, the settings that decide when to flush. So one that records alone (`if rank == 0:`) gets an error
that says so, and a directory that the first process cannot use is an error on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import errors
from ..errors import PrecscopeError, UsageError
from .channel import Channel, default_store
from .merging import Alone, Together

PATIENCE = 120.0
"""Seconds that processes wait for each other at the beginning of recording."""


def started() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def meet(
    model: nn.Module,
    out: Path,
    settings: dict[str, Any],
    prepare: Callable[[], None],
    *,
    group: dist.ProcessGroup | None = None,
    patience: float | None = None,
) -> Alone:
    """Who records with this process: Together, or Alone where each was given a directory of its own.

    group: the processes that train this model together; None: all. settings: must be equal on all of them. prepare:
    makes the directory; the first process calls it, and each one where they have their own.
    Raises UsageError where some do not come within `patience` (PATIENCE) seconds or have other settings; what `prepare`
    raises on the first process is raised on all.
    """
    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    first = dist.get_rank() == ranks[0]
    problem = _problem_of(prepare) if first else None
    note = {
        "out": str(out.absolute()),
        "settings": settings,
        "problem": problem and [type(problem).__name__, str(problem)],
    }
    notes = _exchange(ranks, note, PATIENCE if patience is None else patience)
    if problem is not None:
        raise problem
    if len({n["out"] for n in notes}) > 1:
        if not first:
            prepare()
        return Alone()
    if notes[0]["problem"]:
        kind, text = notes[0]["problem"]
        raise getattr(errors, kind)(f"{text} (said by process {ranks[0]})")
    for rank, other in zip(ranks, notes, strict=True):
        if other["settings"] != notes[0]["settings"]:
            raise UsageError(
                f"process {rank} records with {_words(other['settings'])}, process {ranks[0]} with "
                f"{_words(notes[0]['settings'])}: give ps.record the same on all, or merge=False"
            )
    return Together(model, Channel(notes[0]["meeting"], ranks))


def _problem_of(prepare: Callable[[], None]) -> PrecscopeError | None:
    try:
        prepare()
    except PrecscopeError as error:
        return error
    return None


def _exchange(ranks: list[int], note: dict[str, Any], patience: float) -> list[dict[str, Any]]:
    """Everybody's note, in the order of `ranks`."""
    store, own = default_store(), dist.get_rank()
    among = f"precscope/{ranks[0]}-{ranks[-1]}"
    meeting = f"{among}/{store.add(f'{among}/{own}', 1)}"  # the how-manieth of this process
    names = [f"{meeting}/{rank}" for rank in ranks]
    store.set(names[ranks.index(own)], json.dumps({**note, "meeting": meeting}))
    try:
        store.wait(names, timedelta(seconds=patience))
    except (RuntimeError, torch.distributed.DistError) as error:
        absent = [rank for rank, name in zip(ranks, names, strict=True) if not store.check([name])]
        if not absent:  # the last ones came just now
            return [json.loads(store.get(name)) for name in names]
        store.delete_key(names[ranks.index(own)])  # as if this process had not come, for its next meeting
        store.add(f"{among}/{own}", -1)
        raise UsageError(
            f"process {own} entered ps.record, and process {', '.join(map(str, absent))} of {len(ranks)} did not "
            f"within {patience:g} s: enter it on all of them (statistics are merged, one process writes), or pass "
            "merge=False to record processes apart"
        ) from error
    return [json.loads(store.get(name)) for name in names]


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
