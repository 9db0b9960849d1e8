"""What tuning comes to: the choice, why, and a file that a trainer or a script can read.

plan.tuning.json: {"schema": 1, "task", "choice", "plan", "train": {...}, "loss_scale": {...},
                   "accumulation": {...}, "memory": {...}, "candidates": [...], "reasons": [...], "command"}
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RunDirectoryError, UsageError
from ..plans import PrecisionPlan
from ..reporting.numbers import bytes_text
from ..reporting.text import line_width
from ..store import replacing
from ..tasks import BUNDLED, split_size
from .candidates import Candidate
from .sums import Sums

SCHEMA = 1
_ALLOWED = "write 4GiB, 500MB or a number of bytes"
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Tuning:
    """The choice for one task on this machine.

    choice: "fp32", "bf16" or "fp16" (plain autocast is right and as fast as anything), or "plan". plan: a
    PrecisionPlan for it, uniform where one format does for all, its loss_scale tuned. accumulate: micro-batches per
    optimizer step. split: into how many parts each micro-batch of the task must be cut to fit the memory limit, 1 where
    it fits as it is; `accumulate` counts the parts. examples: per micro-batch of the task, None where not known.
    memory_limit: bytes, None where none was given. candidates: measured side by side. sums: how sums over the
    micro-batches keep in low formats. reasons: in words, the most important first. steps: length of the run to come.
    task: its name on a command line. path: of plan.json, once saved.
    """

    task: str
    choice: str
    plan: PrecisionPlan
    accumulate: int
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    steps: int
    split: int = 1
    examples: int | None = None
    memory_limit: int | None = None
    sums: dict[str, Sums] = field(default_factory=dict)
    lr: float | None = None
    seed: int = 0
    path: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """For ps.train(task, **tuning.settings): plan or precision, steps, accumulate, and lr and seed where given."""
        chosen: dict[str, Any] = {"precision": "fp32"} if self.choice == "fp32" else {"plan": self.plan}
        chosen |= {"steps": self.steps, "accumulate": self.accumulate}
        return chosen | ({"lr": self.lr} if self.lr is not None else {}) | ({"seed": self.seed} if self.seed else {})

    @property
    def command(self) -> str:
        """The same as a command line."""
        how = "--precision fp32" if self.choice == "fp32" else f"--plan {self.path or 'plan.json'}"
        more = f" --lr {self.lr:g}" if self.lr is not None else ""
        more += f" --seed {self.seed}" if self.seed else ""
        name, _ = split_size(self.task)
        reachable = ":" in name or name in BUNDLED  # else it is a function that no command line names
        counts = f"--accumulate {self.accumulate} --steps {self.steps}"
        return f"precscope train {self.task if reachable else 'TASK'} {how} {counts}{more} --out runs/tuned"

    def candidate(self, name: str) -> Candidate:
        """One of the candidates. Raises UsageError where there is none of this name."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        known = ", ".join(c.name for c in self.candidates)
        raise UsageError(f"no candidate {name!r} was tried; there are {known}")

    def save(self, path: str | Path = "plan.json") -> Tuning:
        """Write the plan to `path` and the settings beside it (plan.json -> plan.tuning.json), each whole or not at
        all. Returns this tuning with `path` set, as its command needs it. Raises RunDirectoryError."""
        saved = replace(self, path=Path(path))
        saved.plan.save(path)
        target = settings_path(path)
        with replacing(target) as temporary:
            temporary.write_text(json.dumps(saved.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Content of the settings file. Numbers that are not known are null."""
        train = {k: v for k, v in self.settings.items() if k != "plan"}
        return _plain({
            "schema": SCHEMA,
            "task": self.task,
            "choice": self.choice,
            "plan": str(self.path) if self.path is not None else None,
            "train": train,
            "loss_scale": dict(self.plan.loss_scale),
            "accumulation": {
                "accumulate": self.accumulate, "split": self.split, "examples": self.examples,
                "sums": {f: {**asdict(s), "survives": s.survives} for f, s in self.sums.items()},
            },
            "memory": {"limit_bytes": self.memory_limit},
            "candidates": [{**asdict(c), "memory_bytes": c.memory_bytes} for c in self.candidates],
            "reasons": list(self.reasons),
            "command": self.command,
        })  # fmt: skip

    def __str__(self) -> str:
        lines = [f"choice: {self.choice}, {self.accumulate} micro-batch{'es' if self.accumulate > 1 else ''} per step"]
        lines += ["", *_table(self.candidates), ""]
        width = line_width(most=80)
        lines += [part for text in self.reasons for part in textwrap.wrap(f"- {text}", width, subsequent_indent="  ")]
        return "\n".join(lines)


def load_settings(path: str | Path) -> dict[str, Any]:
    """Content of a settings file that `Tuning.save` wrote.

    Raises RunDirectoryError where it is missing, no JSON, or of a newer schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read as tuned settings ({error}): run precscope tune") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise RunDirectoryError(f"{path} holds no tuned settings (no schema number): run precscope tune")
    if content["schema"] > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {content['schema']}, this precscope reads up to {SCHEMA}: upgrade")
    return content


def settings_path(plan: str | Path) -> Path:
    """Where the settings of a plan file lie: plan.json -> plan.tuning.json."""
    return Path(plan).with_suffix(".tuning.json")


def parse_bytes(text: str | int | float) -> int:
    """ "4GiB", "500 MB", "2e9" or a number, as bytes. Raises UsageError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        number, factor = float(text), 1
    else:
        word = str(text).strip().lower().replace(" ", "")
        digits = word.rstrip("abcdfghijklmnopqrstuvwxyz")
        unit = word[len(digits) :]
        binary = unit.endswith("ib")
        unit = unit.removesuffix("ib") if binary else unit.removesuffix("b")
        try:
            number = float(digits)
            factor = 1024 ** "bkmgt".index(unit or "b") if binary else _UNITS[unit]
        except (ValueError, KeyError):
            raise UsageError(f"cannot read {text!r} as a size of memory: {_ALLOWED}") from None
    if not 1 <= number * factor < math.inf:
        raise UsageError(f"a memory limit must be a finite size of at least a byte, not {text!r}: {_ALLOWED}")
    return int(number * factor)


def _table(candidates: Sequence[Candidate]) -> list[str]:
    """A row per candidate: time of a step, speed beside fp32, memory of one micro-batch, and what to know."""
    base = next((c.step_ms for c in candidates if c.name == "fp32"), float("nan"))
    width = line_width(most=80)
    wide = width >= 74  # narrower terminals do without the range
    spread = f" {'(range)':>17}" if wide else ""
    lines = [f"{'precision':<10} {'ms/step':>9}{spread} {'speed':>6} {'memory':>9}  may be chosen", "-" * width]
    for c in candidates:
        around = f" {f'({c.fastest_ms:.4g} to {c.slowest_ms:.4g})':>17}" if wide else ""
        row = f"{c.name:<10} {c.step_ms:>9.4g}{around} {base / c.step_ms:>6.2f} {bytes_text(c.memory_bytes):>9}  "
        lines.append(row + ("yes" if c.safe else "no"))
        if c.note:
            lines += textwrap.wrap(c.note, width, initial_indent="  ", subsequent_indent="  ", max_lines=3)
    return lines


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value
