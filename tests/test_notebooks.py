"""The code of every notebook runs, cell after cell, and the outputs are committed.

Cells run in this process, in an empty directory and with warnings as errors; what a lesson claims in words its cells
assert. The longer ones are marked slow. The committed outputs are those of a run from top to bottom that had no error,
and hold nothing of the machine that made them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICK = ("01", "06")
"""Lessons of a few seconds; the others train several models, or search for harmful modules."""
_PATHS = re.compile(r"/(?:tmp|home|root|work|usr|Users)/|ipykernel|0x[0-9a-f]{8,}")
_MOST_BYTES = 300_000


def cells_of(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def said(cell: dict) -> str:
    """The text of a code cell's outputs, pictures left out."""
    parts = []
    for output in cell["outputs"]:
        parts.append(output.get("text", ""))
        parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "".join("".join(p) for p in parts)


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem[:2] in QUICK else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(path, "code"), 1):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source(cell), f"{path.name}[{number}]", "exec"), namespace)


def test_the_lessons_are_there():
    assert [p.stem[:2] for p in NOTEBOOKS] == [f"{n:02}" for n in range(1, 8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_of_one_clean_run(path):
    assert path.stat().st_size < _MOST_BYTES
    cells = cells_of(path, "code")
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs), "a lesson has a picture"
    for cell in cells:
        found = _PATHS.search(said(cell))
        assert not found, f"an output holds {found[0]!r}: {said(cell)[:200]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_reads_as_a_lesson(path):
    text = "\n".join(source(c) for c in cells_of(path, "markdown"))
    assert text.startswith(f"# {path.stem[:2]} ")
    for part in ("**Question: ", "**What it means.**", "**Exercise.**", "<details>"):
        assert part in text, f"{path.name} has no {part}"
    for link in re.findall(r"\]\((\.\./[^)#]+)", text):
        assert (path.parent / link).exists(), link
