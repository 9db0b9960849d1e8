"""plan.json: reading and writing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import PlanError, RunDirectoryError
from .encoding import decode, encode, without_repeats

SCHEMA = 1


def text_from(data: dict[str, Any]) -> str:
    """The text of plan.json; inf and NaN as strings."""
    return json.dumps(encode(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def data_from(text: str) -> dict[str, Any]:
    """The fields of a plan from the text of plan.json. Raises PlanError for what is no plan of this schema."""
    try:
        data = decode(json.loads(text, object_pairs_hook=without_repeats))
    except json.JSONDecodeError as error:
        raise PlanError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}; "
            f"correct it there, or write the plan again with `precscope recommend`"
        ) from None
    if not isinstance(data, dict) or "schema" not in data:
        raise PlanError(f'not a plan: a plan is a JSON object with "schema": {SCHEMA}, "default" and "modules"')
    number = data["schema"]
    if type(number) is not int:
        raise PlanError(f"schema: got {number!r}; allowed: {SCHEMA}")
    if number > SCHEMA:
        raise PlanError(f"schema {number} is newer than this precscope reads ({SCHEMA}): upgrade precscope")
    return data


def read(path: Path) -> str:
    """The text of a plan file. Raises PlanError where it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file; `precscope recommend RUN` writes a plan") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}; give the path of a plan.json") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not a plan: the file is not text; give the path of a plan.json") from None


def write(path: Path, text: str) -> None:
    """Write the file beside its name and rename it. Raises RunDirectoryError where that fails; nothing is left then."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"cannot write the plan to {path}: {reason}; give another path") from error
