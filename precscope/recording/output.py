"""Where a recorder's rows go: of one process, of several that are merged, or of one that is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..opstore import at_step, write_ops
from ..store import (
    SCHEMA,
    StatsWriter,
    drop_all_steps,
    prepare_directory,
    rank_name,
    update_json,
    write_json,
    write_truth,
)  # fmt: skip
from .meeting import meet, started
from .merging import Alone
from .observations import Observations
from .provenance import now, provenance

if TYPE_CHECKING:
    from ..opstore import OpRecords
    from .shadow import Truth


class Output:
    """The run directory and who shares it.

    out, exist: see `record`; steps from `first_step` on are dropped from a run that is gone on with. merge: over the
    processes of `group` (None: all), which all make one. settings: what must be equal on them.
    Raises UsageError and RunDirectoryError.
    """

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        *,
        exist: str,
        first_step: int,
        merge: bool,
        settings: dict[str, Any],
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._model, self._out, self._exist, self._merge = model, out, exist, merge
        self._writers: dict[str, StatsWriter] = {}
        self.ranks = Alone()
        self.directory = out
        several = started()
        if several and not merge and torch.distributed.get_rank():
            self.directory = self._own_directory()

        def prepare() -> None:
            prepare_directory(self.directory, exist=exist, ranks=_world() if several and not merge else 1)
            if exist == "append":
                drop_all_steps(self.directory, first_step, below=merge)

        if several and merge:
            self.ranks = meet(model, out, {**settings, "first_step": first_step}, prepare, group=group)
        else:
            prepare()
        if self.ranks.writes:
            self._writer("stats")  # the format's library takes half a second to load: better now than in mid-run

    def rows(self, observations: Observations, kind: str = "stats") -> None:
        """Write the rows of all processes as one part, and forget them. All processes must come here."""
        rows = self.ranks.merge(observations.collect())
        if rows is not None and len(rows):
            writer = self._writer(kind)
            rows.write(writer)
            del rows  # of a large model 25 MB, which putting parts together can use
            writer.tidy()

    def drop(self, step: int) -> None:
        """Take out what was written of `step` and later ones."""
        if self.ranks.writes:
            self._writers.clear()  # they have kept sums of what goes
            drop_all_steps(self.directory, step, below=self._merge)

    def truth(self, truth: Truth, records: OpRecords | None, step: int) -> None:
        """The rest of a shadow step. Rows of ops are not merged: each process writes its own."""
        if self.ranks.writes:
            write_truth(self.directory, truth.columns())
        if records is not None:
            write_ops(self.directory if self.ranks.writes else self._own_directory(), at_step(records, step))

    def graph(self, content: dict[str, Any]) -> None:
        """Write graph.json, that of the first process."""
        if self.ranks.writes:
            write_json(self.directory / "graph.json", content)

    def begin(self, content: dict[str, Any]) -> None:
        """Write run.json."""
        if not self.ranks.writes:
            return
        if self.ranks.world > 1:
            content = {**content, "world_size": self.ranks.world, "merged_over": self.ranks.world}
        write = update_json if self._exist == "append" else write_json
        write(self.directory / "run.json", {"schema": SCHEMA, **provenance(self._model), **content})

    def end(self, content: dict[str, Any], error: BaseException | None) -> None:
        """Complete run.json; a process that does not write it leaves in its own directory what ended it."""
        for writer in self._writers.values():
            writer.close()
        if error is not None:
            content["error"] = f"{type(error).__name__}: {error}"
        if self.ranks.writes:
            update_json(self.directory / "run.json", {**content, "finished": now()})
        elif error is not None:
            content |= {"schema": SCHEMA, "rank": self.ranks.rank, "finished": now()}
            write_json(self._own_directory() / "run.json", content)

    def _own_directory(self) -> Path:
        """Where this process writes what is not merged."""
        rank = torch.distributed.get_rank() if started() else self.ranks.rank
        return self._out if rank == 0 else prepare_directory(self._out / rank_name(rank), exist="append")

    def _writer(self, kind: str) -> StatsWriter:
        if kind not in self._writers:
            where = self.directory if self.ranks.writes else self._own_directory()
            self._writers[kind] = StatsWriter(where, kind=kind)
        return self._writers[kind]


def _world() -> int:
    return torch.distributed.get_world_size()
