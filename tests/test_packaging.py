"""What is installed: the distributions' content, the extras, types, and that reading a run loads no torch."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import reported
from packaging.requirements import Requirement

import precscope
from precscope.plans import PrecisionPlan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(extra: str) -> list[Requirement]:
    """Those of an extra, with those of the extras that it names."""
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "precscope":
            found += [r for inner in requirement.extras for r in requirements(inner)]
        else:
            found.append(requirement)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {normal(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", "\n".join(lines), re.MULTILINE)}


# extras and versions


def test_every_package_that_make_installs_is_pinned_within_its_range():
    pinned = pins("constraints.txt")
    everything = [Requirement(r) for r in PROJECT["dependencies"]]
    for extra in ("test", "docs"):
        everything += requirements(extra)
    for requirement in everything:
        version = pinned.get(normal(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} does not admit {version}"


def test_the_tests_install_every_integration():
    assert {str(r) for r in requirements("all")} <= {str(r) for r in requirements("test")}
    for extra in EXTRAS:
        assert requirements(extra), extra
    everything = {normal(r.name) for r in requirements("all")}
    for extra in set(EXTRAS) - {"all", "test", "docs", "bench", "notebooks"}:
        assert {normal(r.name) for r in requirements(extra)} <= everything, extra


def test_every_extra_that_a_message_or_a_page_names_exists():
    named = {}
    for path in [*(ROOT / "precscope").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md",
                 *(ROOT / "examples").glob("*")]:  # fmt: skip
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        lists = re.findall(r"(?:precscope|pip install [\"']?\.)\[([\w,]+)\]", text)
        lists += re.findall(r"\bneed\(\s*\"[\w.]+\",\s*\"(\w+)\"", text)
        for name in (n for names in lists for n in names.split(",")):
            named.setdefault(name, path.name)
    assert {"hf", "lightning", "keras", "figures"} <= set(named)
    unknown = {name: where for name, where in named.items() if name not in EXTRAS}
    assert not unknown


def test_packages_with_models_are_pinned_with_hashes_and_no_extra_needs_them():
    lines = [x for x in (ROOT / "models.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    needed = {normal(r.name) for extra in EXTRAS for r in requirements(extra)}
    assert not set(pins("models.txt")) & (needed | set(pins("constraints.txt")))


# what needs no torch

READS = """
import sys

def light(what):
    loaded = {"torch", "numba", "triton"} & set(sys.modules)
    assert not loaded, f"{what} loads {', '.join(sorted(loaded))}"

import precscope as ps
light("import precscope")
profile = ps.Profile.load("run")
assert len(profile.ask("e4m3")) and len(profile.ask("fp16", scale_exponent=8))
light("Profile.ask")
assert ps.get_format("fp16").max == 65504 and ps.PrecisionPlan.load("plan.json")
light("PrecisionPlan.load")

from precscope.cli import main

for line in ("ask run fp16", "ask run e5m2 -k 12 --role grad_output", "report run --out a.html --plan plan.json",
             "compare fp32 planned", "report run --run fp32 --run planned --out b.html",
             "forecast run fp16 --horizon 500", "recommend run --out again.json", "bench", "--help"):
    sys.argv = ["precscope", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
    light(line)
"""


def run(code: str, folder: Path, *, path: Path = ROOT, arguments: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, *(arguments or ("-c", code))], capture_output=True, text=True, cwd=folder,
                          env=environment, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recorded run, a plan made of it, and two training runs to compare."""
    reported.made_plan(reported.recorded_run(tmp_path / "run")).save(tmp_path / "plan.json")
    reported.training_run(tmp_path / "fp32")
    reported.training_run(tmp_path / "planned", end=2.003)
    return tmp_path


def test_reading_asking_planning_and_reporting_load_no_torch(folder):
    run(READS, folder)
    assert (folder / "a.html").stat().st_size > 10_000 and PrecisionPlan.load(folder / "again.json")


def test_rooms_of_plans_for_other_engines_and_of_integrations_load_no_torch(tmp_path):
    run("import sys, precscope.converting, precscope.integrations; assert 'torch' not in sys.modules", tmp_path)


# types


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "precscope" / "__init__.pyi").read_text(encoding="utf-8"))
    names = {a.asname for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
    names |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets}
    names |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)} - {"__all__"}
    assert names == set(precscope.__all__)
    where = {a.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert {n: where[n] for n in names & set(where)} == {n: w for n, w in precscope._WHERE.items() if n != "plot"}


# distributions


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """(source distribution, wheel): the first built from a copy of the checkout, the second from the first."""
    pytest.importorskip("build", reason="build is not installed")
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 or later is not installed")
    folder = tmp_path_factory.mktemp("built")
    made = ("__pycache__", "node_modules", "runs", "site", "dist", "build", "*.egg-info")
    left_out = shutil.ignore_patterns(".*", *made)
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "copy"],
                   check=True, capture_output=True, timeout=200)  # fmt: skip
    return next((folder / "dist").glob("*.tar.gz")), next((folder / "dist").glob("*.whl"))


def test_the_wheel_has_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        files = set(wheel.namelist())
        about = email.message_from_bytes(wheel.read(next(n for n in files if n.endswith("METADATA"))))
        entries = wheel.read(next(n for n in files if n.endswith("entry_points.txt"))).decode()
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "precscope").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")}  # fmt: skip
    assert {n for n in files if ".dist-info/" not in n} == package
    assert {"precscope/py.typed", "precscope/__init__.pyi", "precscope/zoo/accept.json"} <= files
    assert "precscope/reporting/templates/report.html.j2" in files
    assert any(n.endswith("licenses/LICENSE") for n in files)
    assert "precscope = precscope.cli:main" in entries
    assert about["Version"] == precscope.__version__ and about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11" and about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# precscope")
    assert set(about.get_all("Provides-Extra")) == {normal(e) for e in EXTRAS}


def test_the_source_distribution_has_what_the_tests_need(distributions):
    with tarfile.open(distributions[0]) as source:
        files = {n.partition("/")[2] for n in source.getnames()}
    for name in ("tests", "docs", "examples", "benchmarks", "notebooks"):
        wanted = {
            p.relative_to(ROOT).as_posix() for p in (ROOT / name).rglob("*")
            if p.suffix in (".py", ".md", ".ipynb", ".js", ".css", ".json") and not p.name.startswith(".")
            and not {"runs", "__pycache__"} & set(p.relative_to(ROOT).parts)
        } - {"notebooks/plan.json"}  # fmt: skip
        assert wanted and wanted <= files, sorted(wanted - files)[:5]
    assert {"pyproject.toml", "constraints.txt", "models.txt", "Makefile", "mkdocs.yml", "README.md", "CHANGELOG.md",
            "LICENSE", "tests/conftest.py", "reports/README.md"} <= files  # fmt: skip
    assert not [n for n in files if "__pycache__" in n or n.startswith(("node_modules", "runs", "."))]


def test_the_wheel_works_where_it_is_unpacked(distributions, folder):
    place = folder / "installed"
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(place)
    said = run("", folder, path=place, arguments=("-m", "precscope", "--version"))
    assert said.strip() == precscope.__version__
    run("", folder, path=place, arguments=("-m", "precscope", "report", "run", "--out", "a.html"))
    assert (folder / "a.html").stat().st_size > 10_000
    run(f"import precscope; assert {str(place)!r} in precscope.__file__", folder, path=place)


USER = """
import torch
import precscope as ps


def advise(folder: str) -> ps.PrecisionPlan:
    plan = ps.recommend(ps.Profile.load(folder))
    reveal_type(plan["a"].compute)
    return plan


def watch(model: torch.nn.Module) -> None:
    with ps.record(model, "runs/a", every=10) as recorder:
        recorder.step()
        reveal_type(recorder)


ps.recomend
"""


@pytest.mark.slow
def test_a_program_that_uses_the_wheel_is_checked_by_mypy(distributions, tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    (tmp_path / "user.py").write_text(USER)
    environment = {**os.environ, "MYPYPATH": "installed"}
    options = ("--strict", "--ignore-missing-imports", "--follow-imports=silent", "--config-file=")
    done = subprocess.run([sys.executable, "-m", "mypy", *options, "user.py"],
                          cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=250)  # fmt: skip
    assert "Literal['fp32']" in done.stdout and '"precscope.recording.recorder.Recorder"' in done.stdout, done.stdout
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and "no attribute" in errors[0] and "recomend" in errors[0], done.stdout
