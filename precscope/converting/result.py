"""What a conversion gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Converted:
    """A plan as another engine takes it.

    target: the engine. value: what it takes (a filter function, a dict, a policy map, the code). text: content of the
    file to write. lost: what the plan says and the engine cannot express, a sentence each. path: where the text was
    written, None where it was not.
    """

    target: str
    value: Any
    text: str
    lost: tuple[str, ...] = ()
    path: Path | None = None

    def __str__(self) -> str:
        return self.text
