"""The application: its commands in the order of the help, and how errors become one line and an exit status."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import PrecscopeError, one_line
from .advice import forecast, recommend
from .converting import convert
from .inference import export, infer
from .machine import bench_app, demo, doctor
from .reading import ask, compare, report
from .running import profile, trace
from .tasks import tasks
from .training import train
from .tuning import tune

app = typer.Typer(
    name="precscope",
    help="Record a training run, ask any number format, get a precision plan with reasons, train with it, compare.\n\n"
    "Example: precscope profile gpt --out runs/a && precscope recommend runs/a && "
    "precscope train gpt --plan plan.json --out runs/b",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="--debug (or PRECSCOPE_DEBUG=1) anywhere on the line shows the traceback of an error.",
)

for _command in (
    demo, doctor, tasks, profile, ask, recommend, forecast, tune, train, infer, export, convert, compare, trace, report,
):  # fmt: skip
    app.command()(_command)
app.add_typer(bench_app, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry of the console script: errors become one line and an exit status."""
    debug = "--debug" in sys.argv or os.environ.get("PRECSCOPE_DEBUG", "") not in ("", "0")
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        app()
    except PrecscopeError as error:
        _fail(error, f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        print("interrupted; what was written before is intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        _fail(error, f"error: {one_line(error, limit=1000)} (--debug shows where)", 1, debug)


def _fail(error: BaseException, text: str, status: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(status)
