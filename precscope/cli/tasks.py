"""The command that lists the tasks that come with precscope, and fetches their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .printing import next_command, say, wrote

if TYPE_CHECKING:
    from ..bundled import TaskInfo


def tasks(
    task: Annotated[str | None, typer.Argument(help="tell more about this one: sizes, what it needs")] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="bring the data that no package installs into the cache directory")
    ] = False,
) -> None:
    """List the tasks that come with precscope: real models on real data, and what each needs.

    Example: precscope tasks text --fetch
    """
    from ..bundled import TASKS, cache_dir, task_info
    from ..bundled import fetch as bring

    if task is None:
        if fetch:
            with_data = " or ".join(f"precscope tasks {i.name} --fetch" for i in TASKS.values() if i.files)
            raise UsageError(f"--fetch is for one task: {with_data}")
        _list(TASKS)
        return
    info = task_info(task)
    if fetch and not info.files:
        raise UsageError(f"{task} needs no data but what its packages hold: leave out --fetch")
    for data in info.files if fetch else ():
        wrote(bring(data))
    _describe(info)
    if any(data.path() is None for data in info.files):
        next_command(f"precscope tasks {task} --fetch")
    elif info.files or info.name == "smollm2":
        say(f"Converted weights and fetched data lie in {cache_dir()} (PRECSCOPE_CACHE names another place).")
    else:
        next_command(f"precscope profile {task} --steps 20 --out runs/{task}")


def _list(known: dict[str, TaskInfo]) -> None:
    rows = [(i.name, i.model, _short(i.parameters), i.data, "no" if i.missing() else "yes") for i in known.values()]
    _table(("task", "model", "params", "data", "here"), rows)
    for info in known.values():
        if info.missing():
            print(f"\n{info.name} needs")
            _lines(info.missing())
    print()
    say("All have the sizes tiny, small (the default), medium and large: precscope profile gpt --size medium.")
    next_command("precscope tasks text")


def _describe(info: TaskInfo) -> None:
    print(f"{info.name}: {info.model}, on {info.data}")
    _table(("size", ""), list(info.sizes.items()))
    needed = [(need.name, "here" if need.found() else need.install) for need in info.needs]
    needed += [(d.name, str(d.path() or f"precscope tasks {info.name} --fetch ({d.size_mb:g} MB)")) for d in info.files]
    if needed:
        _table(("needs", ""), needed)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _short(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 1e5 else f"{count / 1e3:.3g} k"


def _lines(missing: list[str]) -> None:
    for line in missing:
        print(f"  {line}")
