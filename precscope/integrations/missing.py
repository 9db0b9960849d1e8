"""Packages that an integration needs and precscope does not: one clear sentence where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import UsageError


def need(module: str, extra: str, *, package: str | None = None) -> ModuleType:
    """The module named `module`, imported. extra: the extra of precscope that installs it. package: its name on the
    registry, where that is another.

    Raises UsageError where it is not installed, or where something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        missing = (error.name or "").partition(".")[0]
        why = f"{name} is not installed"
        if missing and missing != module.partition(".")[0]:
            why = f"{name} cannot be imported: {missing} is not installed"
        elif not isinstance(error, ModuleNotFoundError):
            why = f"{name} cannot be imported ({error})"
        raise UsageError(f'{why}: pip install "precscope[{extra}]"') from error
