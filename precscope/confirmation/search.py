"""Which modules cannot be low: found with few passes.

Everything low at once is tried first; where that holds, nothing is to be found. Else each module is tried low alone
(many modules: in groups that are halved where they do harm), those that harm most are kept high until the whole holds,
and each of them is then let go again where the whole holds without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .judgement import Judgement

Holds = Callable[[frozenset[str]], Judgement]
"""high modules -> judgement of the whole with these high and all others low."""
Alone = Callable[[Collection[str]], Judgement]
"""modules -> judgement of these low and all others fp32."""

_SINGLES = 48  # up to so many modules are tried one by one from the start


@dataclass
class Finding:
    """high: modules that must stay high. alone: module -> its judgement when it alone is low, where it was tried so.
    before: judgement of the whole as it was at first; after: as it is with `high`. complete: False where the passes
    ran out before `high` was as small as it could be."""

    high: frozenset[str]
    before: Judgement
    after: Judgement
    alone: dict[str, Judgement] = field(default_factory=dict)
    complete: bool = True


def find_high(
    units: Sequence[str],
    holds: Holds,
    alone: Alone,
    *,
    start: frozenset[str] = frozenset(),
    budget: int,
    spent: Callable[[], int] | None = None,
) -> Finding:
    """The smallest set of `units` (a superset of `start`) found that must be high.

    units: names, parents before children. budget: passes that `holds` and `alone` may make together. spent: how many
    were made so far, by any count; None: each call makes one.
    """
    counter = _Counter(budget, spent)
    counter.take()
    before = holds(start)
    if before.passed:
        return Finding(start, before, before)
    rest = [u for u in units if u not in start]
    scores = _scores(rest, alone, counter)
    ranked = sorted(rest, key=lambda u: -_score_of(u, scores))
    high, after = _add(start, ranked, scores, holds, counter)
    if not after.passed:
        return Finding(high, before, after, _singles(scores), complete=False)
    high, after = _let_go(start, high, after, scores, holds, counter)
    return Finding(high, before, after, _singles(scores), complete=counter.left > 0)


class _Counter:
    def __init__(self, budget: int, spent: Callable[[], int] | None) -> None:
        self._calls = 0
        self._spent = spent or (lambda: self._calls)
        self._end = self._spent() + budget

    @property
    def left(self) -> int:
        """Passes that may still be made."""
        return self._end - self._spent()

    def take(self) -> bool:
        """Whether one more call may be made; counts it."""
        allowed = self.left > 0
        self._calls += 1
        return allowed


def _scores(units: list[str], alone: Alone, counter: _Counter) -> dict[tuple[str, ...], Judgement]:
    """Judgements of groups of neighbours, harmful ones halved down to single modules while passes remain. Some of the
    budget is left for what follows."""
    keep = max(4, counter.left // 4)
    room = max(1, min(counter.left - keep, _SINGLES))
    size = max(1, -(-len(units) // room))
    groups = [tuple(units[i : i + size]) for i in range(0, len(units), size)]
    scores: dict[tuple[str, ...], Judgement] = {}
    while groups:
        group = groups.pop(0)
        if counter.left <= keep:
            break
        counter.take()
        scores[group] = alone(group)
        if len(group) > 1 and scores[group].score > 0.5:
            del scores[group]
            half = len(group) // 2
            groups = [group[:half], group[half:], *groups]
    return scores


def _score_of(unit: str, scores: dict[tuple[str, ...], Judgement]) -> float:
    return max((j.score for group, j in scores.items() if unit in group), default=0.0)


def _singles(scores: dict[tuple[str, ...], Judgement]) -> dict[str, Judgement]:
    return {group[0]: judgement for group, judgement in scores.items() if len(group) == 1}


def _add(
    start: frozenset[str],
    ranked: list[str],
    scores: dict[tuple[str, ...], Judgement],
    holds: Holds,
    counter: _Counter,
) -> tuple[frozenset[str], Judgement]:
    """Keep the most harmful high until the whole holds: those that fail alone at first, then ever more of the rest."""
    count = max(1, sum(_score_of(u, scores) > 1.0 for u in ranked))
    while True:
        high = start | frozenset(ranked[:count])
        counter.take()
        after = holds(high)
        if after.passed or count >= len(ranked):
            return high, after
        count = len(ranked) if counter.left <= 2 else min(len(ranked), count + max(1, count // 2))


def _let_go(
    start: frozenset[str],
    high: frozenset[str],
    after: Judgement,
    scores: dict[tuple[str, ...], Judgement],
    holds: Holds,
    counter: _Counter,
) -> tuple[frozenset[str], Judgement]:
    """Try each module low again, containers first, then the least harmful: what a child does shows in its parent too.
    One by one where passes suffice, else many at once first."""
    names = sorted(high - start, key=lambda u: (not any(v != u and _inside(v, u) for v in high), _score_of(u, scores)))
    half = len(names) // 2
    pending = [[name] for name in names] if len(names) <= counter.left else [names[:half], names[half:]]
    while pending:
        part = pending.pop(0)
        if not part or high - frozenset(part) == start:  # that is where it failed at first
            if len(part) > 1:
                pending = [part[: len(part) // 2], part[len(part) // 2 :], *pending]
            continue
        if not counter.take():
            return high, after
        tried = holds(high - frozenset(part))
        if tried.passed:
            high, after = high - frozenset(part), tried
        elif len(part) > 1:
            pending = [part[: len(part) // 2], part[len(part) // 2 :], *pending]
    return high, after


def _inside(name: str, container: str) -> bool:
    return name != container and (not container or name.startswith(container + "."))
