"""The documentation: its commands exist, its links lead somewhere, the site builds.

Every command in the README and in docs/ is known to be run, or at least to be accepted:

- pages of docs/guide and docs/users, the quick start and the README are run by tests/test_guides.py, but for what a
  page marks as not run, and `precscope bench`, which takes minutes and is run on fewer cases by tests/test_bench.py;
- the commands of reports/README.md made the committed reports; reports/make.py runs them;
- each `precscope ...` anywhere, in a block or in a line of text, must name a command that there is, and only options
  that its help lists; each `python FILE ...` and `make TARGET` a script, options and a target that there are.

So a command cannot be misspelt or outlive its option, and those in the pages that people start from really ran. The
benchmarks of docs/benchmarks.md, whose figures took hours, are run in their short setting by .ci/run. What is only
checked by name: commands in running text.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = [ROOT / folder / "README.md" for folder in ("", "examples", "reports", "reports/gpu")]
PAGES = sorted([*READMES, *(ROOT / "docs").rglob("*.md")])
_PROGRAMS = ("precscope", "python", "make")
_BLOCK = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (?:\$ )?((?:precscope|python|make) .*)$", re.MULTILINE)
_INLINE = re.compile(r"`((?:precscope|make|python(?= -m| [\w/.]+\.py)) [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_in(text: str) -> list[str]:
    """Every command line of a page: in blocks (indented or fenced) and between backticks, one string each."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for language, body in _BLOCK.findall(text):
        if language in ("console", "sh", "bash", ""):
            lines = [line.removeprefix("$ ") for line in body.splitlines() if language != "console" or line[:2] == "$ "]
            found += [line for line in lines if line.split(" ")[0] in _PROGRAMS]
    outside = _BLOCK.sub("", text)
    found += _INDENTED.findall(outside)
    flat = re.sub(r"\n(?!\n)", " ", outside)
    return [*found, *_INLINE.findall(flat)]


def words_of(line: str) -> list[str]:
    """The words of the first command of a line; what stands for something else (`...`, NAMES) is left as it is."""
    line = re.split(r"\s(?:&&|\||>|;)\s", line)[0].replace("...", "").replace("[", " ").replace("]", " ")
    return shlex.split(line, comments=True)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", text))


COMMANDS = [
    pytest.param(page.relative_to(ROOT).as_posix(), line, id=f"{page.stem}: {line[:60]}")
    for page in PAGES
    for line in dict.fromkeys(commands_in(page.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return hooks().commands()


def test_every_command_of_the_docs_exists(helps):
    wrong = [
        f"{where}: {line}\n    {why}" for where, line in (p.values for p in COMMANDS) if (why := fault(line, helps))
    ]
    assert not wrong, "\n".join(wrong)
    assert len(COMMANDS) > 60


def fault(line: str, helps: dict[str, str]) -> str:
    """Why a command line would be refused, or ""."""
    program, *rest = words_of(line)
    used = options_in(" ".join(rest)) - {"-"}
    if program == "make":
        return "" if re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else "no such target"
    if program == "python":
        return script_fault(rest, used)
    if rest[:1] == ["--help"] or not rest or rest[0].startswith("-"):
        known = helps["precscope"]
    else:
        if f"precscope {rest[0]}" not in helps:
            return f"no command {rest[0]!r}" if rest[0].islower() else ""
        if rest[0] == "bench" and len(rest) > 1 and f"precscope bench {rest[1]}" not in helps:
            from precscope.bench import BENCHMARKS

            return "" if rest[1] in BENCHMARKS or rest[1].isupper() else f"no benchmark {rest[1]!r}"
        known = (
            helps[f"precscope {' '.join(rest[:2])}"]
            if rest[0] == "bench" and len(rest) > 1
            else helps[f"precscope {rest[0]}"]
        )
    missing = used - options_in(known) - {"--help", "--debug", "--version"}
    return f"no option {', '.join(sorted(missing))}" if missing else ""


def script_fault(rest: list[str], used: set[str]) -> str:
    if rest[0] in ("-m", "-c"):
        return ""
    path = ROOT / rest[0]
    if not path.is_file():
        return f"no file {rest[0]}"
    known = options_in(path.read_text(encoding="utf-8")) | {"--json", "--help"}
    return f"no option {', '.join(sorted(used - known))}" if used - known else ""


def test_faults_are_seen(helps):
    assert fault("precscope ask runs/a fp16 -k 12 --role output", helps) == ""
    assert fault("precscope ask runs/a fp16 --rolle output", helps) == "no option --rolle"
    assert fault("precscope asq runs/a fp16", helps) == "no command 'asq'"
    assert fault("precscope bench nothing", helps) == "no benchmark 'nothing'"
    assert fault("python benchmarks/recorder.py --steps 60", helps) == ""
    assert fault("python benchmarks/recorder.py --stebs 60", helps) == "no option --stebs"
    assert fault("python benchmarks/none.py", helps) == "no file benchmarks/none.py"
    assert fault("make nothing", helps) == "no such target"
    page = "a `precscope ask\nruns/a` b\n\n    precscope doctor   # x\n\n"
    page += "```console\n$ precscope tune \\\n   t\nprecscope no\n```\n"
    assert [" ".join(words_of(c)) for c in commands_in(page)] == [
        "precscope tune t",
        "precscope doctor",
        "precscope ask runs/a",
    ]


def test_links_between_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(_BLOCK, "", page.read_text(encoding="utf-8"))
        for link in _LINK.findall(text):
            if "://" not in link and not link.startswith(("#", "mailto:")):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_every_page_is_in_the_site():
    nav = re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2])
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    mirrored = set(hooks().mirrored().values())
    assert not pages - set(nav), "pages that no menu leads to"
    assert not set(nav) - pages - mirrored, "entries without a page"
    assert {f"notebooks/{p.stem}.md" for p in (ROOT / "notebooks").glob("*.ipynb")} <= set(nav)


def test_the_api_page_has_every_public_name():
    import precscope

    page = hooks().api_reference()
    told = set(re.findall(r'heading: "ps\.(\w+)"', page))
    assert told == {name for name in precscope.__all__ if not name.startswith("__")}
    assert "## More" not in page, "put the name into a section of docs/hooks.py"


def test_the_zoo_page_has_every_case():
    page = hooks().zoo_table()
    cases = {p.stem for p in (ROOT / "precscope" / "zoo").glob("*.py") if p.stem != "__init__"}
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == cases
    assert page.count("- met in: ") >= sum(not c.startswith("ctl_") for c in cases)


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml")
    made = hooks().with_formulas("cost\n$2^{k}$ or $5\n\n$$\n\\frac{a}{b}\n$$\n\n```\n$x$\n```\n")
    assert made.startswith("cost <math")
    assert made.count("<math") == 2 and "<mfrac>" in made and "or $5" in made and "```\n$x$\n```" in made


def test_links_to_mirrored_files_are_moved():
    move = hooks().rewritten_links
    assert move("[a](../../examples/README.md)", "docs/guide/README.md", "guide/README.md") == "[a](../examples.md)"
    assert move("[a](../docs/guide/guard.md#x)", "notebooks/a.ipynb", "notebooks/a.md") == "[a](../guide/guard.md#x)"
    assert move("[a](../notebooks/06_find_a_nan.ipynb)", "docs/a.md", "a.md") == "[a](notebooks/06_find_a_nan.md)"
    assert move("[a](https://x.org/y.md)", "docs/a.md", "a.md") == "[a](https://x.org/y.md)"
    assert move("[a](nothing.md)", "docs/b/a.md", "b/a.md") == "[a](nothing.md)"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a build with a warning, such as a broken link, fails."""
    for needed in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
                           cwd=ROOT, env=environment, capture_output=True, text=True)  # fmt: skip
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-3000:]
    return out


@pytest.mark.slow
def test_site_builds_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if page.is_relative_to(site / "reports"):
            continue
        for kind, link in re.findall(r'<(?:script|img|iframe|source)[^>]*\b(src)="([^"]+)"', text):
            assert not link.startswith(("http", "//")), f"{page.name}: {kind} {link}"
        for link in re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', text):
            assert not link.startswith(("http", "//")), f"{page.name}: {link}"
    assert "<math" in (site / "how-it-works.html").read_text(encoding="utf-8")
    assert "precscope recommend" in (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert not list(site.rglob("hooks.py"))


@pytest.mark.slow
def test_site_and_its_search_work_from_disk(site):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        for page in ("index", "how-it-works", "reference/api", "notebooks/01_formats_and_rounding"):
            browser.get((site / f"{page}.html").as_uri())
            assert not browser.get_log("browser"), page
        browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("swallowed")
        WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, ".md-search-result__item"))
        assert not browser.get_log("browser")
