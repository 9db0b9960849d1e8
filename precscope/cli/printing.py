"""What commands share: arguments that mean the same everywhere, and how they say what they did."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..profiles import Profile
    from ..progress import Progress

TaskArgument = Annotated[str, typer.Argument(help="file.py:function, module:function, or a bundled task such as gpt")]
SizeOption = Annotated[
    str | None,
    typer.Option(help="size of the task, for bundled ones tiny, small, medium or large; gpt@large is the same"),
]
RunArgument = Annotated[Path, typer.Argument(help="run directory, as written by profile or train")]
FormatArgument = Annotated[str, typer.Argument(help="fp16, bf16, e4m3, e5m2, ...")]
SeedOption = Annotated[int, typer.Option(help="seed of parameters, data order and dropout")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace a run that is already there")]
SkipOption = Annotated[bool, typer.Option("--skip-damaged", help="leave out parts that cannot be read")]
RowsOption = Annotated[int, typer.Option(help="rows to print; 0 for all")]
LiveOption = Annotated[bool, typer.Option("--live", help="show loss, scale, nearest sites and time left as it goes on")]
TensorboardOption = Annotated[
    Path | None, typer.Option(help="also write a TensorBoard file: scalars, and histograms of recorded steps")
]
WandbOption = Annotated[
    str | None, typer.Option(help="also tell Weights & Biases: the project; without network WANDB_MODE=offline")
]
MlflowOption = Annotated[
    str | None, typer.Option(help="also tell MLflow: tracking URI, such as sqlite:///mlflow.db or http://...")
]
CsvOption = Annotated[Path | None, typer.Option(help="also write all rows to this CSV file")]


def with_size(task: str | None, size: str | None) -> str | None:
    """The task as later commands must name it: gpt@large for gpt and --size large. Raises UsageError without a task."""
    from ..tasks import sized

    if task is None:
        if size is not None:
            raise UsageError(f"--size {size} is of the task: give --task, too")
        return None
    return sized(task, size)


def exist(overwrite: bool) -> str:
    """What --overwrite means to the functions of the package."""
    return "overwrite" if overwrite else "error"


def load(run: Path, *, skip_damaged: bool) -> Profile:
    """The run, with a word on standard error about each part that was left out."""
    from ..profiles import Profile

    profile = Profile.load(run, skip_damaged=skip_damaged)
    for part in profile.damaged:
        print(f"left out the damaged part {part}", file=sys.stderr)
    return profile


def progress() -> Progress:
    """Bars on a terminal, lines elsewhere."""
    from ..progress import Progress

    return Progress()


def say(text: str) -> None:
    """Print a sentence, wrapped to the terminal."""
    print(textwrap.fill(text, max(40, shutil.get_terminal_size().columns)))


def wrote(*paths: Path, next: str | None = None) -> None:
    """Say what was written, and the command to try next."""
    print("wrote " + ", ".join(str(p) for p in paths))
    if next:
        next_command(next)


def next_command(command: str) -> None:
    """Print the command to try next on a line of its own, however long."""
    print(f"next: {command}")


def write_csv(table: Any, path: Path) -> None:
    """Write a DataFrame whole or not at all."""
    from ..store import replacing

    with replacing(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(temporary, index=False)
