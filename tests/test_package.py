"""The package as a whole: public names, direction of imports, light start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import precscope

ROOT = Path(precscope.__file__).parent

# From the ground up; a module imports only from rooms before its own (or its own package).
ORDER = [
    "errors", "formats", "sites", "histogram", "stats", "reference", "rounding", "kernels", "store", "events",
    "opstore", "plans", "profiles", "batches", "preservation", "bundled", "tasks", "attribution", "emulation",
    "applying", "recording", "tracing", "advice", "training", "confirmation", "profiling", "replaying", "comparison",
    "reporting", "plotting", "progress", "live", "tuning", "inference", "exporting", "integrations",
    "converting", "doctor", "demo", "zoo", "bench",
    "cli",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms imported anywhere in the file, for typing only excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(ROOT).parts)
    rooms = set()
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.ImportFrom) or node.level != depth:
            continue
        names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
        rooms |= {n for n in names if n in ORDER}
    return rooms


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ORDER, f"{room} has no place in ORDER"
    above = {r for r in imported_rooms(path) if ORDER.index(r) > ORDER.index(room)}
    assert above <= ALLOWED.get(room, set()), f"{path.name} imports {above}"


# A Comparison prints itself as reporting's table; a Profile and a plan show themselves in notebooks.
ALLOWED = {"comparison": {"reporting"}, "profiles": {"reporting"}, "plans": {"reporting"}}


def test_reporting_and_training_do_not_know_each_other():
    for room, other in (("reporting", "training"), ("training", "reporting")):
        for path in (ROOT / room).rglob("*.py"):
            assert other not in imported_rooms(path), path


def test_public_names_resolve():
    for name in precscope.__all__:
        assert getattr(precscope, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'recomend'"):
        precscope.recomend  # noqa: B018


def test_no_function_is_hidden_by_a_module_of_its_name():
    modules = {p.stem for p in ROOT.iterdir()}
    assert not modules & set(precscope.__all__)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", [
    "import precscope",
    "from precscope import get_format; get_format('fp16')",
    "from precscope import Profile, PrecisionPlan, TensorStats",
    "import precscope.cli",
    "from precscope import recommend, compare, report",
])  # fmt: skip
def test_analysis_needs_no_torch(code):
    assert run(f"{code}\nimport sys; print('torch' in sys.modules)").strip() == "False"


def test_start_is_light():
    loaded = run("import precscope.cli, sys; print(*[m for m in ('pandas', 'pyarrow', 'numba', 'scipy', 'plotly', "
                 "'numpy', 'matplotlib') if m in sys.modules])")  # fmt: skip
    assert loaded.split() == []
