"""A comparison in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .equivalence import Difference, Ratio
    from .pairing import Against


_WIDE = 100  # an interval that spans this factor is no information


def signed(share: float) -> str:
    """A relative difference as a percentage with its sign: "+0.12%", "-3.4%"; a dash where it is not known."""
    if share != share:
        return "–"
    if abs(share) < 1e-9:  # far below what fp32 resolves
        return "+0.00%"
    return f"{100 * share:+.2f}%" if abs(share) >= 1e-4 else f"{100 * share:+.1g}%"


def percentage(share: float) -> str:
    """A level or a margin: "2%", "0.5%", "97.5%"."""
    return f"{100 * share:.6g}%"


def between(difference: Difference, interval: tuple[float, float]) -> str:
    """An interval of a difference, relative to the baseline: "[-0.30%, +0.55%]"."""
    return f"[{', '.join(signed(difference.relative(x)) for x in interval)}]"


def verdict(against: Against) -> str:
    """What may be said of the run, in a few words."""
    if against.kind == "incomparable":
        return f"not comparable: {against.why_unpaired}"
    if against.kind in ("diverged", "baseline diverged"):
        return _diverged(against)
    if against.loss is None or against.kind == "unfinished":
        return "no verdict: not finished"
    return judged(against.loss)


def judged(loss: Difference) -> str:
    """The verdict on a difference of losses."""
    margin = percentage(loss.margin)
    if loss.kind == "one seed":
        return f"one seed: no interval over seeds; difference {signed(loss.share)} ({_place(loss)}); use --seeds 5"
    if loss.kind == "equivalent":
        return f"equivalent within {margin}"
    if loss.kind == "undecided":
        return (
            f"undecided: the interval {between(loss, loss.inner_interval)} reaches beyond the margin of {margin}; "
            "more seeds"
        )
    return f"different: {loss.kind} by {signed(abs(loss.share)).lstrip('+')}"


def _place(loss: Difference) -> str:
    if loss.within:
        return f"within the margin of {percentage(loss.margin)}"
    return f"{'worse' if loss.mean > 0 else 'better'} than the margin of {percentage(loss.margin)}"


def _diverged(against: Against) -> str:
    which, who = against.diverged, "diverged"
    if against.kind == "baseline diverged":
        which, who = against.baseline_diverged, f"the baseline {against.baseline} diverged"
    told = "; ".join(how if seed < 0 else f"seed {seed}: {how}" for seed, how in which.items())
    many = f" in {len(which)} of {len(against.seeds)} seeds" if len(against.seeds) > 1 else ""
    return f"{who}{many} ({told})"


def evidence(against: Against) -> str:
    """What the verdict rests on: difference, interval, test, sample."""
    loss = against.loss
    if loss is None or not loss.df:
        return ""
    inner, outer = percentage(2 * loss.confidence - 1), percentage(loss.confidence)
    if loss.kind in ("worse", "better"):
        interval = f"{outer} interval {between(loss, loss.interval)}"
    else:
        interval = f"{inner} interval {between(loss, loss.inner_interval)}"
    tests = f"two one-sided tests at {percentage(1 - loss.confidence)}: p {p_value(loss.p_equivalence)}"
    n, m = loss.sizes
    sample = f"{n} pairs of seeds" if loss.paired else f"{n} and {m} seeds, not paired (Welch)"
    figures = f"{against.measure} {loss.mean + loss.baseline:.4g} against {loss.baseline:.4g}, {signed(loss.share)}"
    return f"{figures}, {interval}; {tests}; {sample}"


def p_value(p: float) -> str:
    """ "0.031", "<0.0001"."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def speed_text(speed: Ratio) -> str:
    """ "1.52x [1.48, 1.57]"; "1.52x (one ratio, no interval)"."""
    if speed.mean != speed.mean:
        return "–"
    lo, hi = speed.interval
    if lo != lo:
        return f"{speed.mean:.2f}x (one ratio, no interval)"
    if hi > _WIDE * lo:
        return f"{speed.mean:.2f}x (the pairs differ too much to say more)"
    return f"{speed.mean:.2f}x [{lo:.2f}, {hi:.2f}]"
