"""Every page of docs/guide and docs/users and the quick start run, block after block, and so does the project's README.

The convention is that of docs/guide/README.md. A page runs in one process of its own: Python blocks share a namespace,
and commands are run by the console script's own entry in the same process, which spares the import of torch.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted(p for p in (ROOT / "docs" / "guide").glob("*.md") if p.name != "README.md")
USERS = sorted(p for p in (ROOT / "docs" / "users").glob("*.md") if p.name != "index.md")
PAGES = [*GUIDES, *USERS, ROOT / "docs" / "quickstart.md"]
LONG = dict.fromkeys(("distributed", "inference"), pytest.mark.slow)
"""Pages that take more than a few seconds: several processes, torch.export and ONNX."""
SHOWN = {"", "sh", "bash", "text", "json", "toml", "yaml"}
_FENCE = re.compile(r"^```(\w*)(.*)$")

SERVER = """
import gc, json, os, signal, sys, traceback
import pandas, pyarrow.parquet, torch
import precscope.comparison, precscope.profiling, precscope.training
from precscope.cli import main

gc.freeze()  # the trainer collects garbage: not again in what each page has from here

def page():
    names = {"__name__": "__main__"}
    for step in json.load(open(".steps.json")):
        where = f"{step['page']}:{step['line']}"
        print(f"--- {step['kind']} at {where}", flush=True)
        if step["kind"] == "file":
            open(step["name"], "w").write(step["text"])
        elif step["kind"] == "python":
            exec(compile("\\n" * step["line"] + step["text"], step["page"], "exec"), names)
        else:
            sys.argv = step["command"]
            try:
                main()
                status = 0
            except SystemExit as end:
                status = end.code or 0
            assert status == step["status"], f"{where}: {' '.join(step['command'])} ended with {status}"

for line in sys.stdin:
    limit, folder = line.rstrip("\\n").split(" ", 1)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        signal.alarm(int(limit))
        status = 1
        try:
            page()
            status = 0
        except BaseException:
            sys.stdout.flush()
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Step:
    """What a page does next. line: of the block's fence, from 1. text: of a file or of Python. command, status: of the
    command line, without the prompt, and how it must end."""

    kind: str
    page: str
    line: int
    name: str = ""
    text: str = ""
    command: tuple[str, ...] = ()
    status: int = 0


def steps_of(text: str, page: str, *, installed=lambda name: importlib.util.find_spec(name) is not None) -> list[Step]:
    """The steps of a page in order. Raises AssertionError for a block that the convention does not know."""
    found: list[Step] = []
    lines = text.splitlines()
    start: int | None = None
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        missing = re.match(r"<!-- needs: ([\w.]+) -->", line)
        if start is None and missing and not installed(missing[1]):
            return found
        if fence is None:
            continue
        if start is None:
            start, language, rest = number, fence[1], fence[2].strip()
            continue
        if not lines[start - 2].startswith("<!-- not run:"):
            found += _steps_of_block(language, rest, lines[start : number - 1], page, start)
        start = None
    assert start is None, f"{page}:{start}: the block has no end"
    return found


def _steps_of_block(language: str, rest: str, lines: list[str], page: str, start: int) -> list[Step]:
    text = "\n".join(lines) + "\n"
    if language == "python":
        title = re.fullmatch(r'title="([\w./-]+)"', rest) or re.match(r"# (\w+\.py)$", lines[0] if lines else "")
        if title:
            return [Step("file", page, start, name=title[1], text=text)]
        return [Step("python", page, start, text=text)]
    if language == "console":
        return _commands([line[2:] for line in _joined(lines) if line.startswith("$ ")], page, start)
    assert language in SHOWN, f"{page}:{start}: unknown kind of block {language!r}; see docs/guide/README.md"
    return []


def _joined(lines: list[str]) -> list[str]:
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def _commands(lines: list[str], page: str, start: int) -> list[Step]:
    found = []
    for line in lines:
        status = re.search(r"#\s*exit (\d+)\s*$", line)
        words = tuple(shlex.split(line, comments=True))
        assert words[0] == "precscope", f"{page}:{start}: only precscope is run, not {words[0]!r}: mark the block sh"
        found.append(Step("console", page, start, command=words, status=int(status[1]) if status else 0))
    return found


@pytest.fixture(scope="module")
def run():
    """Runs steps in a folder, in a process of their own; what it printed. The process is a fork of one that has torch
    imported: importing it for each page would take longer than most pages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=environment) as server:  # fmt: skip

        def run(steps: list[Step], folder: Path, *, limit: int = 240) -> str:
            (folder / ".steps.json").write_text(json.dumps([asdict(s) for s in steps]))
            print(limit, folder, file=server.stdin, flush=True)
            status = server.stdout.readline().strip()
            said = (folder / ".said").read_text()
            assert status == "0", f"status {status}\n{said[-5000:]}"
            return said

        yield run
        server.stdin.close()


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=LONG.get(p.stem, ())) for p in PAGES])
def test_page_runs(path, tmp_path, run):
    steps = steps_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    needs = re.search(r"<!-- needs: ([\w.]+) -->", path.read_text(encoding="utf-8"))
    if not steps and needs:
        pytest.skip(f"{needs[1]} is not installed")
    assert any(s.kind != "file" for s in steps), "a page has an example that runs"
    assert len(re.findall(r"^--- \w+ at docs/", run(steps, tmp_path), re.MULTILINE)) == len(steps)


@pytest.mark.parametrize("path", [*GUIDES, *USERS], ids=lambda p: p.stem)
def test_page_is_in_the_index(path):
    index = path.parent / ("README.md" if path in GUIDES else "index.md")
    assert f"({path.name})" in index.read_text(encoding="utf-8")


def readme_steps() -> list[Step]:
    """The task's file, the commands that are indented (but for bench, which takes minutes), and Python blocks that are
    whole; one that holds `...` is a sketch."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [s for s in steps_of(text, "README.md") if s.kind == "file" or not _is_sketch(s.text)]
    indented = re.compile(r"^    (precscope (?!bench)(?:.*\\\n)*.*)$", re.MULTILINE)
    for found in indented.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        blocks += _commands(_joined(found[1].splitlines()), "README.md", line)
    return sorted(blocks, key=lambda s: s.line)


def _is_sketch(code: str) -> bool:
    return any(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and n.value.value is ...
               for n in ast.walk(ast.parse(code)))  # fmt: skip


def test_readme_has_the_whole_loop():
    steps = readme_steps()
    assert steps[0].kind == "file" and steps[0].name == "my_task.py"
    commands = [s.command[1] for s in steps if s.kind == "console"]
    assert {"doctor", "profile", "ask", "recommend", "train", "compare", "report"} <= set(commands)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme_runs(tmp_path, run):
    run(readme_steps(), tmp_path, limit=880)
    assert (tmp_path / "plan.json").exists() and (tmp_path / "reports" / "a.html").exists()


# the convention itself

PAGE = """
# A page

```python title="my_task.py"
def make(): ...
```

```python
x = 1
```

```console
$ precscope doctor --json  # what this machine can do
{"cpu": ...}
$ precscope train my_task.py:make \\
    --steps 3
$ precscope nonsense  # exit 2
```

<!-- not run: needs two machines -->
```python
raise SystemExit
```

```sh
rm -rf everything
```

<!-- needs: no_such_package -->
```python
raise SystemExit
```
"""


def test_blocks_are_read_as_documented():
    steps = steps_of(PAGE, "page.md")
    assert [s.kind for s in steps] == ["file", "python", "console", "console", "console"]
    assert (steps[0].name, steps[0].text) == ("my_task.py", "def make(): ...\n")
    assert steps[3].command == ("precscope", "train", "my_task.py:make", "--steps", "3")
    assert [s.status for s in steps[2:]] == [0, 0, 2]
    assert steps[2].command == ("precscope", "doctor", "--json")
    assert len(steps_of(PAGE, "page.md", installed=lambda name: True)) == 6
    named = steps_of("```python\n# my_task.py\nx = 1\n```\n", "p")
    assert (named[0].kind, named[0].name) == ("file", "my_task.py")


@pytest.mark.parametrize(("text", "message"), [
    ("```pyton\nx\n```\n", "page.md:1: unknown kind of block 'pyton'"),
    ("```console\n$ rm -rf x\n```\n", "only precscope is run, not 'rm'"),
    ("```python\nx = 1\n", "page.md:1: the block has no end"),
])  # fmt: skip
def test_mistakes_in_pages_are_told(text, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        steps_of(text, "page.md")


def test_a_page_that_fails_fails(tmp_path, run):
    page = "```python\nimport precscope as ps\nx = 3\n```\n\n```python\nassert ps.get_format('fp16').max == x\n```\n"
    with pytest.raises(AssertionError, match=r'File "page.md", line 7'):
        run(steps_of(page, "page.md"), tmp_path)
    (tmp_path / ".said").unlink()
    page = "```console\n$ precscope ask runs/none fp16\n```\n"
    with pytest.raises(AssertionError, match="precscope ask runs/none fp16 ended with 1"):
        run(steps_of(page, "page.md"), tmp_path)
    assert "--- console" in run(steps_of(page.replace("fp16\n", "fp16  # exit 1\n"), "page.md"), tmp_path)
