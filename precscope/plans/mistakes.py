"""What is wrong with a plan, in one line that names the field, what was given and what is allowed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from ..errors import PlanError, nearest


def short(value: Any) -> str:
    """A value as text of at most 60 characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value)) + "]"
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    """The first mistake as "field: what was given, what is allowed", and how many more there are."""
    problems = error.errors(include_url=False)
    others = len({p["loc"][:1] for p in problems}) - 1  # by field: a union reports each of its branches
    return _problem(problems[0], cls) + (f" (and {others} more)" if others else "")


def _problem(problem: Any, cls: type[BaseModel]) -> str:
    where, kind, given = _where(problem["loc"]), problem["type"], short(problem["input"])
    if kind == "value_error":
        inner = str(problem["ctx"]["error"])
        return f"{where}.{inner}" if isinstance(problem["ctx"]["error"], PlanError) and where else _joined(where, inner)
    if kind == "extra_forbidden":
        fields = _fields(cls, problem["loc"])
        near = nearest(str(problem["loc"][-1]), fields, count=1)
        hint = f" (did you mean {near}?)" if near else ""
        return f"{where}: unknown field{hint}; known fields: {', '.join(fields)}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "literal_error":
        return f"{where}: got {given}; allowed: {problem['ctx']['expected']}"
    return f"{where}: got {given}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _joined(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text


def _fields(cls: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The fields there are at `loc`: those of the record, or of the dictionary that its field holds."""
    field = cls.model_fields.get(str(loc[0]))
    if field is not None and is_typeddict(field.annotation):
        return list(field.annotation.__annotations__)
    return [f.alias or name for name, f in cls.model_fields.items()]


def _where(loc: Sequence[Any]) -> str:
    """("modules", "blocks.3", "compute") -> modules['blocks.3'].compute"""
    text = ""
    for i, part in enumerate(loc):
        if isinstance(part, int) or (i == 1 and loc[0] == "modules"):
            text += f"[{part!r}]"
        elif not part.startswith(("str", "Reason", "function-", "literal", "list", "none")):  # a branch of a union
            text += f".{part}" if text else part
    return text
