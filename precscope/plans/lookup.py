"""Which entry of a plan decides for a module.

The entry of exactly its name, else the one pattern that matches it, else what the nearest parent has; "" is the root
module, everybody's parent.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanError, nearest


def is_pattern(key: str) -> bool:
    """Whether `key` has a wildcard: such a key is an exact name, too."""
    return any(c in key for c in "*?[")


@dataclass(frozen=True)
class Lookup:
    """entries: those of the plan, by key; only their keys matter here. patterns: the keys that are patterns."""

    entries: dict[str, Any] = field(default_factory=dict, compare=False)
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = ()

    @classmethod
    def of(cls, entries: dict[str, Any]) -> Lookup:
        """The look-up among `entries`, their patterns compiled."""
        return cls(entries, tuple((k, re.compile(fnmatch.translate(k))) for k in entries if is_pattern(k)))

    def sources(self, names: Iterable[str]) -> dict[str, str | None]:
        """The deciding key for each name, None where there is none. Raises PlanError where two patterns match."""
        known: dict[str, str | None] = {}
        return {name: self._source(name, known) for name in names}

    def _source(self, name: str, known: dict[str, str | None]) -> str | None:
        if name not in known:
            key = self._matching(name)
            if key is None and name:
                key = self._source(name.rpartition(".")[0], known)
            known[name] = key
        return known[name]

    def _matching(self, name: str) -> str | None:
        if name in self.entries:
            return name
        keys = [key for key, pattern in self.patterns if pattern.match(name)]
        if len(keys) > 1:
            raise PlanError(
                f"module {name or '(root)'!r} matches two patterns of the plan, {keys[0]!r} and {keys[1]!r}; "
                f"name it exactly, narrow one pattern, or use 'default' for what is meant for the rest"
            )
        return keys[0] if keys else None

    def check(self, names: Iterable[str]) -> None:
        """See PrecisionPlan.check."""
        names = list(names)
        known, patterns = {"", *names}, dict(self.patterns)
        wrong = [
            key
            for key in self.entries
            if key not in known and not (key in patterns and any(patterns[key].match(name) for name in names))
        ]
        if wrong:
            said = [self._unknown(key, names) for key in wrong[:3]]
            if len(wrong) > 3:
                said.append(f"and {len(wrong) - 3} more")
            raise PlanError(f"the plan was made for another model: {'; '.join(said)}; correct these names in the plan")
        self.sources(names)

    def _unknown(self, key: str, names: list[str]) -> str:
        if is_pattern(key):
            return f"pattern {key!r} matches no module"
        near = nearest(key, names)
        return f"no module {key!r}" + (f" (did you mean {near}?)" if near else "")
