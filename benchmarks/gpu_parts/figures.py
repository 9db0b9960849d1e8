"""Figures of the report, as PNG files. What has no result is not drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .targets import LARGE_MB, result

COLOURS = {"fp32": "#1b2027", "tf32": "#6b7683", "fp16": "#e0a030", "bf16": "#2a8fd0", "plan": "#d1490a",
           "plan with fp8": "#00875f", "all e4m3": "#a8559a"}  # fmt: skip
DASHES = {"fp32": "-", "bf16": "--", "fp16": ":"}


def draw(content: dict[str, Any], out: Path) -> dict[str, str]:
    """Write what can be drawn; file name -> caption. Nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {}
    for name, (figure, caption) in FIGURES.items():
        fig, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        if figure(content, axes):
            if content["rehearsal"]:
                axes.set_title("rehearsal on a CPU: no GPU figures", loc="right", fontsize=8, color="#b00020")
            fig.savefig(out / f"{name}.png", dpi=130)
            drawn[f"{name}.png"] = caption
        plt.close(fig)
    return drawn


def _shares(content: dict[str, Any], axes: Any) -> bool:
    rows = result(content, "kernels").get("rows", [])
    kernels = {"accumulate": "#2a8fd0", "accumulate_update": "#00875f", "accumulate_weights": "#d1490a",
               "torch.sum": "#8a94a0"}  # fmt: skip
    for kernel, colour in kernels.items():
        for dtype, dash in DASHES.items():
            points = [(r["megabytes"], 100 * r["share"]) for r in rows if (r["kernel"], r["dtype"]) == (kernel, dtype)]
            if points:
                axes.plot(*zip(*points, strict=True), dash, color=colour, marker=".", label=f"{kernel}, {dtype}")
    axes.axhline(80, color="#1b2027", lw=0.8)
    axes.axvline(LARGE_MB, color="#1b2027", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="MB per tensor", ylabel="% of copy bandwidth", ylim=(0, None))
    return _with_legend(axes, fontsize=6, ncols=2)


def _overhead(content: dict[str, Any], axes: Any) -> bool:
    rows = result(content, "recorder").get("rows", [])
    labels = [f"{r['precision']}\nevery={r['every']}" for r in rows]
    places = range(len(rows))
    axes.bar(places, [100 * (r["ratio"] - 1) for r in rows], color="#2a8fd0", label="measured")
    axes.plot(places, [100 * (r["floor_ratio"] - 1) for r in rows], "_", color="#1b2027", ms=22, mew=2,
              label="bytes over copy bandwidth")  # fmt: skip
    limits = {1: 25.0, 10: 2.0}
    marks = [(i, limits[r["every"]]) for i, r in enumerate(rows) if r["every"] in limits]
    if marks:
        axes.plot(*zip(*marks, strict=True), "v", color="#d1490a", label="asked at most")
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.set_ylabel("% above an unwatched step")
    return bool(rows) and _with_legend(axes)


def _steps(content: dict[str, Any], axes: Any) -> bool:
    found = {"": result(content, "training"), ", compiled": result(content, "compiled")}
    bars = [(name + how, name, s) for how, part in found.items()
            for name, s in part.get("in_turn", {}).get("steps", {}).items()]  # fmt: skip
    for i, (_, name, step) in enumerate(bars):
        axes.barh(i, step["ms"], color=COLOURS.get(name, "#8a94a0"))
        axes.plot([step["low_ms"], step["high_ms"]], [i, i], color="#1b2027", lw=2)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms per training step (median, quartiles), in turn")
    return bool(bars)


def _losses(content: dict[str, Any], axes: Any) -> bool:
    runs = result(content, "training").get("runs", {})
    for i, (name, run) in enumerate(runs.items()):
        if run.get("losses"):
            style = ("-", "--", ":", "-.")[i % 4]
            axes.plot(run["losses"], style, color=COLOURS.get(name, "#8a94a0"), label=name, lw=1.3)
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    return _with_legend(axes)


def _products(content: dict[str, Any], axes: Any) -> bool:
    rows = result(content, "matmuls").get("rows", [])
    words = list(dict.fromkeys(word for row in rows for word in row["tflops"]))
    width = 0.8 / max(len(words), 1)
    for j, word in enumerate(words):
        colour = COLOURS.get(word, ("#00875f", "#66b39b", "#a8559a")[j % 3])
        at = [i + (j - len(words) / 2 + 0.5) * width for i in range(len(rows))]
        axes.bar(at, [row["tflops"].get(word) or 0 for row in rows], width, color=colour, label=word)
    axes.set_xticks(range(len(rows)), [f"{r['product']}\n{' x '.join(map(str, r['shape']))}" for r in rows], fontsize=6)
    axes.set_ylabel("10^12 FLOP/s")
    return bool(rows) and _with_legend(axes)


def _with_legend(axes: Any, **options: Any) -> bool:
    """Whether there was anything to name."""
    named = bool(axes.get_legend_handles_labels()[1])
    if named:
        axes.legend(**{"fontsize": 7, **options})
    return named


FIGURES: dict[str, tuple[Callable[[dict[str, Any], Any], bool], str]] = {
    "overhead": (_overhead, "What a recorder adds to a training step, beside the floor and what was asked"),
    "kernels": (_shares, "One-pass kernels: bytes they must move over time, as a share of copy bandwidth"),
    "steps": (_steps, "Time per training step, all in turn in one process"),
    "losses": (_losses, "Training loss from the same start on the same data"),
    "products": (_products, "The GPT's matrix products, forward"),
}  # fmt: skip
