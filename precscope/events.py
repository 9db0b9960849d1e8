"""events.jsonl: what the guard saw and did, one JSON object a line, in the order in which it happened.

Lines are only ever added: of a run that was killed and resumed, or went back, the file tells that too ("resume",
"rollback"), and the steps after such a line are told again. Each line is written at once and whole; a line that a kill
cut short is left out by the reader and removed by the next writer.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import RunDirectoryError
from .store import json_text

SCHEMA = 1
NAME = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """One line. step: optimizer step, from 0. kind: what was seen ("overflow", "invalid", "scale", "spike", "harm",
    "swallowed", "data", "weights", "everywhere", "unexplained", "replay") or happens by itself ("resume", "quiet").
    action: what was done ("none", "warn", "rescale", "promote", "rollback", "skip", "retry", "keep", "restore",
    "stop"). module, op: at fault, "" where none is known (or where it is the root module, see text); code outside every
    module is "(outside)". text: in words. numbers: the same for machines. plan: file of the plan from here on, "" where
    it did not change."""

    step: int
    kind: str
    action: str
    text: str
    module: str = ""
    op: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    schema: int = SCHEMA


class EventLog:
    """Writes the file. path: None where this process writes none. events: those of this process."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.events = path, list[Event]()
        self._warned = False

    def begin(self) -> None:
        """An empty file: a run in which nothing happened says so."""
        if self.path is not None:
            with suppress(OSError):
                self.path.touch()

    def write(self, event: Event) -> None:
        """Add a line; where the disk is full, warn once and go on."""
        self.events.append(event)
        if self.path is None:
            return
        line = (json_text(asdict(event)) + "\n").encode()
        try:
            with open(self.path, "ab+") as file:
                _end_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = f"the guard cannot write {self.path} ({error.strerror}): its events are lost from here on"
                warnings.warn(text, RuntimeWarning, stacklevel=2)


def read_events(path: str | Path) -> list[Event]:
    """The events of a run, in order. path: events.jsonl or the run directory.

    A last line that was cut short is left out. Raises RunDirectoryError where there is no such file, or another line is
    damaged or of a newer schema.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({error.strerror}): a run under a guard writes it at the first event "
            "(precscope train --guard warn)"
        ) from error
    events = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end was cut short
        try:
            content = json.loads(line)
            newer = content["schema"] > SCHEMA
            event = None if newer else Event(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise RunDirectoryError(f"{path}, line {number}, is damaged ({error}): remove that line") from error
        if event is None:
            raise RunDirectoryError(f"{path} has schema {content['schema']}, this precscope reads up to {SCHEMA}")
        events.append(event)
    return events


def _end_line(file: Any) -> None:
    """Remove what a kill left of a last line."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if not size:
        return
    file.seek(max(0, size - (1 << 20)))
    tail = file.read()
    if not tail.endswith(b"\n"):
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
