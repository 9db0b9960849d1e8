"""What was asked, beside what was found. Everything is computed from the results; what has no figure says so."""

from __future__ import annotations

from typing import Any

EQUAL_LOSS = 0.01
"""How far a held-out loss may lie above that of the autocast run it is compared with, relative to it."""
LARGE_MB = 16
"""From this size on kernels must come near copy bandwidth."""

MET, MISSED, UNKNOWN = "met", "missed", "not measured"


def targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per target: what, asked, value, shown, status ("met", "missed", "not measured"). In a rehearsal all are not
    measured: a CPU's figures are no figures of a GPU."""
    rows = [*_correct(content), *_recorder(content), *_kernels(content), *_plans(content)]
    if content["rehearsal"]:
        for row in rows:
            row["status"] = UNKNOWN
            row["shown"] = f"{row['shown']} on this CPU" if row["value"] is not None else row["shown"]
    return rows


def result(content: dict[str, Any], part: str) -> dict[str, Any]:
    """What the part found, {} where nothing."""
    return content["parts"].get(part, {}).get("result", {})


def _row(what: str, asked: str, value: float | None, met: bool | None, shown: str | None = None) -> dict[str, Any]:
    status = UNKNOWN if value is None or met is None else MET if met else MISSED
    text = shown if shown is not None else "no figure" if value is None else f"{value:.3g}"
    return {"what": what, "asked": asked, "value": value, "shown": text, "status": status}


def _at_most(what: str, value: float | None, limit: float) -> dict[str, Any]:
    return _row(what, f"at most {limit:g}", value, None if value is None else value <= limit)


def _correct(content: dict[str, Any]) -> list[dict[str, Any]]:
    found = result(content, "correctness")
    wrong = None
    if found.get("mismatches") is not None:
        wrong = sum(found["mismatches"].values()) + len(found.get("errors", {}))
        if not wrong and "error" in content["parts"]["correctness"]:
            wrong = None  # it ended before its last check
    return [
        _row("mismatches and errors of kernels, formats and 8-bit products against the CPU", "0", wrong, wrong == 0)
    ]


def _recorder(content: dict[str, Any]) -> list[dict[str, Any]]:
    rows = result(content, "recorder").get("rows", [])
    found = []
    for every, limit in ((1, 1.25), (10, 1.02)):
        for word in ("fp16", "bf16"):
            ratio = next((r["ratio"] for r in rows if r["every"] == every and r["precision"] == word), None)
            found.append(_at_most(f"recorder, {word}, every={every}, over unwatched steps", ratio, limit))
    return found


def _kernels(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The worst share of all large tensors, by kernel."""
    rows = result(content, "kernels").get("rows", [])
    found = []
    for kernel in ("accumulate", "accumulate_update", "accumulate_weights"):
        large = [r for r in rows if r["kernel"] == kernel and r["megabytes"] >= LARGE_MB]
        worst = min(large, key=lambda r: r["share"], default=None)
        value = worst["share"] if worst else None
        shown = f"{value:.0%} ({worst['dtype']}, {worst['megabytes']:g} MB)" if worst and value is not None else None
        met = None if value is None else value >= 0.8
        if met and "error" in content["parts"]["kernels"]:
            met = None  # it ended early: the worst may be missing
        what = f"{kernel}: least share of copy bandwidth from {LARGE_MB} MB on"
        found.append(_row(what, "at least 80%", value, met, shown))
    return found


def _plans(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Time over that of the faster autocast, which must also be reached at equal loss."""
    steps = result(content, "training").get("in_turn", {}).get("steps", {})
    runs = result(content, "training").get("runs", {})
    autocast = {w: steps[w]["ms"] for w in ("fp16", "bf16") if w in steps}
    best = min(autocast, key=lambda w: autocast[w], default=None)
    found = []
    for name, limit, asked in (
        ("plan", 1.0, "at most 1, at equal loss"),
        ("plan with fp8", 1.0, "below 1, at equal loss"),
    ):
        value = steps[name]["ms"] / autocast[best] if best is not None and name in steps else None
        losses = [runs.get(w, {}).get("eval_loss") for w in (name, best)] if best else [None, None]
        met, shown = None, None
        if value is not None and None not in losses:
            excess = losses[0] / losses[1] - 1
            equal = excess <= EQUAL_LOSS
            fast = value < limit if "below" in asked else value <= limit
            met = fast and equal
            shown = f"{value:.3f} of {best}'s time; held-out loss {excess:+.2%} against it"
        found.append(_row(f"{name}: time per step over the faster autocast's", asked, value, met, shown))
    return found
