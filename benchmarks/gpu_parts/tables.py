"""The results as tables of text. What was not found is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .targets import result


@dataclass(frozen=True)
class Table:
    """title and note in words; head and rows of text, all of one length."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numbers(self) -> set[int]:
        """Columns whose cells begin with a digit or a sign: set to the right."""
        return {i for i in range(len(self.head)) if all(_numeric(row[i]) for row in self.rows)}


def _numeric(text: str) -> bool:
    return text == "" or text[0] in "0123456789+-"


def tables(content: dict[str, Any]) -> list[Table]:
    """All that have rows."""
    makers = (_targets, _recorder, _steps, _runs, _plans, _kernels, _many, _products, _costs, _shadow, _checks, _parts)
    return [table for make in makers for table in make(content) if table.rows]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; empty where there is none."""
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _targets(content: dict[str, Any]) -> Iterator[Table]:
    rows = [(t["what"], t["asked"], t["shown"], t["status"]) for t in content.get("targets", [])]
    yield Table("Targets", ("what", "asked", "found", ""), rows)


def _recorder(content: dict[str, Any]) -> Iterator[Table]:
    rows = [
        (r["precision"], str(r["every"]), f"{r['plain_ms']:.2f}", f"{r['ms']:.2f}", f"{r['ratio']:.3f}",
         f"{r['floor_ratio']:.3f}", f"{r['bytes_of_a_recorded_step'] / 1e9:.3g}", f"{100 * r['plain_spread']:.1f}%")
        for r in result(content, "recorder").get("rows", [])
    ]  # fmt: skip
    head = ("precision", "every", "unwatched ms", "watched ms", "ratio", "floor", "GB read", "spread")
    note = (
        "Means of steps in turn. floor: the ratio if the bytes that the kernels are given in a recorded step moved "
        "at copy bandwidth. spread: quartiles of unwatched steps."
    )
    yield Table("What recording costs", head, rows, note)


def _steps(content: dict[str, Any]) -> Iterator[Table]:
    for part, title in (("training", "Time per step"), ("compiled", "Time per step under torch.compile")):
        turns = result(content, part).get("in_turn", {})
        rows = [(name, f"{s['ms']:.2f}", f"{s['low_ms']:.2f} to {s['high_ms']:.2f}", number(s["tokens_per_second"]))
                for name, s in turns.get("steps", {}).items()]  # fmt: skip
        rows += [(name, "failed", error, "") for name, error in turns.get("failed", {}).items()]
        yield Table(title, ("run", "ms", "quartiles", "tokens/s"), rows, "Steps of all in turn, in one process.")


def _runs(content: dict[str, Any]) -> Iterator[Table]:
    rows = []
    for name, r in result(content, "training").get("runs", {}).items():
        if "error" in r:
            rows.append((name, "failed: " + r["error"].splitlines()[0], *[""] * 6))
            continue
        rows.append((name, f"{r['train_loss']:.4f}", "" if r["eval_loss"] is None else f"{r['eval_loss']:.4f}",
                     f"{r['step_time_ms']:.2f}", number(r["tokens_per_second"]), f"{r['peak_memory_bytes'] / 1e9:.2f}",
                     str(r["skipped_steps"]), str(r["nonfinite_steps"])))  # fmt: skip
    head = ("run", "train loss", "held-out loss", "ms per step", "tokens/s", "peak GB", "skipped", "non-finite")
    note = f"{content['training_steps']} steps from the same start on the same data, one run after the other."
    yield Table("Training in each precision", head, rows, note)


def _plans(content: dict[str, Any]) -> Iterator[Table]:
    found = result(content, "advice")
    rows = []
    for name in ("plan", "plan with fp8"):
        if name in found:
            p = found[name]
            counts = ", ".join(f"{fmt} {n}" for fmt, n in p["counts"].items())
            rows.append((name, p["status"], counts, p["says"] or "", f"{p['confirm_seconds']:.0f} s"))
    yield Table(
        "Plans", ("plan", "status", "modules", "in words", "confirmed in"), rows, found.get("not_confirmed", "")
    )


def _kernels(content: dict[str, Any]) -> Iterator[Table]:
    found = result(content, "kernels")
    rows = [(r["kernel"], r["dtype"], f"{r['megabytes']:g}", f"{r['ms']:.4f}", f"{r['floor_ms']:.4f}",
             f"{100 * r['share']:.0f}%", r["timed"]) for r in found.get("rows", [])]  # fmt: skip
    rate = found.get("copy_bytes_per_s")
    note = (
        f"floor: bytes that must move over {rate / 1e12:.3g} TB/s, measured for a copy. graph: without the host's time."
        if rate
        else ""
    )
    yield Table("Kernels", ("kernel", "dtype", "MB", "ms", "floor ms", "share", "timed"), rows, note)


def _many(content: dict[str, Any]) -> Iterator[Table]:
    found = result(content, "kernels").get("many")
    if found:
        rows = [(how, f"{ms:.3f}", f"{found['floor_ms'] / ms:.0%}") for how, ms in found["ms"].items()]
        title = f"{found['tensors']} tensors of {found['bytes_each'] // 1024} kB"
        yield Table(title, ("how", "ms", "share"), rows)


def _products(content: dict[str, Any]) -> Iterator[Table]:
    rows = result(content, "matmuls").get("rows", [])
    words = list(dict.fromkeys(word for row in rows for word in row["ms"]))
    cells = [(r["product"], " x ".join(map(str, r["shape"])), *(number(r["ms"].get(w)) for w in words)) for r in rows]
    yield Table("Matrix products of the GPT, ms", ("product", "rows x sum x columns", *words), cells)


def _costs(content: dict[str, Any]) -> Iterator[Table]:
    costs = result(content, "advice").get("costs") or []
    words = [w for w in ("fp32", "fp16", "bf16", "e4m3") if any(w in row for row in costs)]
    largest = sorted(costs, key=lambda row: -(row.get("fp32") or 0))[:20]
    rows = [(row["module"] or "(root)", *(number(row.get(w)) for w in words)) for row in largest]
    rows.append(("all", *(number(sum(row.get(w) or 0 for row in costs)) for w in words)))
    note = "ms of forward and backward, children not counted: the dearest 20 in fp32. e4m3 where the device has it."
    yield Table("Measured costs per module", ("module", *words), rows if costs else [], note)


def _shadow(content: dict[str, Any]) -> Iterator[Table]:
    found = result(content, "shadow")
    rows = [(name, f"{f.get('fp32_ms') or f.get('plain_ms'):.2f}", f"{f['ms']:.2f}", f"{f['ratio']:.2f}")
            for name, f in found.items()]  # fmt: skip
    note = "Shadow steps over fp32 forward and backward; the tracer over the bf16 one that it watches."
    yield Table("Shadow steps and op level", ("what", "plain ms", "ms", "ratio"), rows, note)


def _checks(content: dict[str, Any]) -> Iterator[Table]:
    found = result(content, "correctness")
    rows = [(name, str(n)) for name, n in found.get("mismatches", {}).items()]
    rows += [(name, f"raised {error}") for name, error in found.get("errors", {}).items()]
    note = f"Kernels: {found.get('backend')}. 8-bit products: {found.get('fp8')}."
    yield Table("Mismatches against the CPU", ("check", "mismatches"), rows, note)


def _parts(content: dict[str, Any]) -> Iterator[Table]:
    rows = [(name, f"{part['seconds']:.0f}", "failed" if "error" in part else "done")
            for name, part in content["parts"].items()]  # fmt: skip
    tests = result(content, "tests").get("summary")
    yield Table("Parts", ("part", "seconds", ""), rows, f"Tests marked gpu: {tests}." if tests else "")
