"""What was measured about a model, for the recommender: it overrules what ranges only suspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..plans import Reason


@dataclass
class Measured:
    """formats: those that were tried on the model itself. forbidden: (unit, format) -> reasons, from the trial.

    Where a format was tried, the rules that warn of what *might* harm (head-room, SQNR, gradients under a common loss
    scale, a parent's own code) give way to what was seen; recorded values beyond the format's end do not.
    """

    formats: frozenset[str] = frozenset()
    forbidden: dict[tuple[str, str], list[Reason]] = field(default_factory=dict)

    def keeps(self, reason: Reason, fmt: str) -> bool:
        """Whether a reason of the range rules still stands."""
        if fmt not in self.formats or reason.code in ("nonfinite", "cost", "forecast"):
            return True
        return reason.code == "overflow" and reason.numbers["amax"] > reason.numbers["limit"]

    def forbid(self, unit: str, fmt: str, reason: Reason) -> None:
        """Add a reason."""
        self.forbidden.setdefault((unit, fmt), []).append(reason)

    def units(self, fmt: str) -> Sequence[str]:
        """Units that `fmt` is forbidden for."""
        return [unit for unit, f in self.forbidden if f == fmt]
