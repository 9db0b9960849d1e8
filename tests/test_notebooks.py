"""The code of every notebook runs, cell after cell, and the outputs are committed."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert cells and all(c["outputs"] for c in cells if not "".join(c["source"]).strip().startswith("import"))
    namespace: dict[str, object] = {}
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
