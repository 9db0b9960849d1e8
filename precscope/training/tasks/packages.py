"""Packages that carry weights: found without importing them, since some start programs when imported, and read without
progress bars, which belong to the command that asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import TaskError


def package_folder(module: str) -> Path:
    """The folder of an installed package. Raises TaskError where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"{module} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars, and without notes on weights that a file holds and a model leaves out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
