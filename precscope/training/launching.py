"""Start the processes of one machine that train together: `precscope train TASK --processes 2`.

torch.distributed.elastic starts and watches them, as torchrun does: where one dies, by an exception, a signal or an
exit, it ends the others, and the error here says which it was, how it ended and where its output is. What is started is
this very command line without --processes; each process finds its rank in its environment.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError, UsageError
from .engine import PEER_GONE

_MARK = "PRECSCOPE_LAUNCHED"


def launch(arguments: Sequence[str], *, processes: int, logs: str | Path) -> None:
    """Run `python ARGUMENTS` on `processes` processes of this machine and wait for all of them.

    The first one writes to this terminal, and all write into files below `logs`. Raises UsageError for less than one
    process, TrainingError naming the first process that failed (its exit code or signal, its last line of output, the
    file of that output); the others have been ended by then.
    """
    if processes < 1:
        raise UsageError(f"--processes must be 1 or more, not {processes}")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = Path(logs).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    both = dict.fromkeys(range(1, processes), Std.ALL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex[:8], rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2, start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=both),
    )  # fmt: skip
    os.environ[_MARK] = "1"  # inherited
    try:
        elastic_launch(config, entrypoint=sys.executable)(*arguments)
    except ChildFailedError as error:
        order = sorted(error.failures.items(), key=lambda f: (f[1].exitcode == PEER_GONE, f[1].timestamp))
        rank, failure = order[0]
        raise TrainingError(_in_words(rank, failure, processes, folder)) from error
    finally:
        os.environ.pop(_MARK, None)


def is_not_first() -> bool:
    """Whether this is one of several processes, and not the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) > 0


def started_by_launch() -> bool:
    """Whether `launch` started this process, and goes on when it is done."""
    return _MARK in os.environ


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """Command-line arguments without `name VALUE` or `name=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == name:
            skip = not skip
        elif not argument.startswith(f"{name}="):
            kept.append(argument)
    return kept


def _in_words(rank: int, failure: Any, processes: int, folder: Path) -> str:
    how = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    text = f"process {rank} of {processes} (pid {failure.pid}) {how}, and the others were ended"
    if rank == 0:
        return f"{text}: its output is above"
    written = sorted(folder.glob(f"**/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    if not written:
        return text
    lines = [line.strip() for line in written[-1].read_text(errors="replace").splitlines() if line.strip()]
    said = f" ({lines[-1]:.300})" if lines and failure.exitcode > 0 else ""
    return f"{text}{said}: its output is in {written[-1]}"
