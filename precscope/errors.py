"""Every error precscope raises on purpose.

    PrecscopeError
    |-- UsageError (also ValueError)        what was asked cannot be done as asked; CLI exit status 2
    |   |-- FormatError                     no such number format
    |   |-- PlanError                       a plan that is malformed, ambiguous, or made for another model
    |   |-- TaskError                       a task, batch or loss function that returns the wrong thing
    |   `-- ModelError                      a model that cannot be recorded or planned
    `-- RunError (also RuntimeError)        the request was right, the world was not; CLI exit status 1
        |-- RunDirectoryError               missing, damaged, foreign or unwritable run directory
        `-- TrainingError                   training cannot go on

Messages say what was given, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrecscopeError(Exception):
    """Base of every error that precscope raises on purpose."""

    exit_code = 1


class UsageError(PrecscopeError, ValueError):
    """What was asked cannot be done as asked."""

    exit_code = 2


class FormatError(UsageError):
    """No such number format."""


class PlanError(UsageError):
    """A plan that is malformed, ambiguous, or made for another model."""


class TaskError(UsageError):
    """A task, batch or loss function that returns the wrong thing."""


class ModelError(UsageError):
    """A model that cannot be recorded or planned."""


class RunError(PrecscopeError, RuntimeError):
    """The request was right, the world was not."""


class RunDirectoryError(RunError):
    """Missing, damaged, foreign or unwritable run directory."""


class TrainingError(RunError):
    """Training cannot go on."""


def first_line(error: BaseException) -> str:
    """What an error says first: the first line of its message that is not blank, the name of its class where it has
    none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, *, limit: int = 120) -> str:
    """Class and first line of an error, "ValueError: too few batches", the line cut at `limit` characters."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line[:limit]}"


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Words that name the entries of `known` most like `name`: "a, b or c", or "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    if len(close) < 2:
        return "".join(close)
    return ", ".join(close[:-1]) + " or " + close[-1]
