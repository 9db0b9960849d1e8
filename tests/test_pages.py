"""The pages beside the report: the zoo's, and the index of the committed reports. In a browser: no complaint, no
request, nothing serious for axe-core, folded parts are printed. And reports/make.py: its index is true."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import browsing
import pytest
from browsing import addresses, complaints, open_page

from precscope.bench.page import save_page
from precscope.bench.scoring import Score
from precscope.bench.zoo import ZooResult, own_zoo

ROOT = Path(__file__).parents[1]
in_browser = pytest.mark.skipif(browsing.MISSING, reason=browsing.WHY)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Both pages; the zoo's has a case that was cured, one that was missed, one that broke, and a look-alike."""
    folder = tmp_path_factory.mktemp("pages")
    ends = {"fp32": "0.1", "low": "nan!", "planned": "0.1", "low_fails": True, "leaves": 4, "high_leaves": 1}
    scores = (
        Score("dice_overlap", "fp16", True, **ends, passed=True, named=True, high={"overlap": "not fp16: 1 < 2 & so"}),
        Score("token_sum", "bf16", True, **ends, passed=True, high={"a": "why"}, needless=["a"]),
        Score("phase_sum", "fp16", True, fp32="0.1", low="9", low_fails=True, error="ValueError: no"),
        Score("ctl_recurrent", "fp16", False, fp32="0.1", low="0.1", planned="0.1", passed=True, leaves=3),
    )
    zoo = save_page(ZooResult(str(own_zoo()), scores, 0, 12.0), folder / "zoo.html")
    reports = folder / "reports"
    shutil.copytree(ROOT / "reports", reports, ignore=shutil.ignore_patterns("__pycache__"))
    make = runpy.run_path(str(ROOT / "reports" / "make.py"), run_name="make")
    make["write_index"](reports)
    return {"zoo": zoo, "index": reports / "index.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed: pages are not tried in a browser")
    driver = browsing.start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@in_browser
@pytest.mark.skipif(not browsing.AXE.is_file(), reason="axe-core is not installed (npm install --no-save axe-core@4)")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", ["zoo", "index"])
def test_pages_are_accessible_and_ask_for_nothing(browser, pages, name, width, scheme):
    browsing.emulate(browser, width=width, scheme=scheme)
    open_page(browser, pages[name])
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert complaints(browser) == []
    assert all(a.startswith("file:") for a in addresses(browser))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_script(browsing.AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(arguments[0])")
    assert len(found["passes"]) > 15
    bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not bad, [(v["id"], n["html"][:150]) for v in bad for n in v["nodes"][:3]]


@in_browser
@pytest.mark.parametrize("path", sorted((ROOT / "reports").glob("*/index.html")), ids=lambda p: p.parent.name)
def test_committed_reports_open_from_disk_and_fit_a_phone(browser, path):
    browsing.emulate(browser, width=390)
    open_page(browser, path)
    assert complaints(browser) == []
    assert all(a.startswith(("file:", "data:")) for a in addresses(browser))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert path.stat().st_size < 8_000_000


@in_browser
def test_the_zoo_prints_its_verdicts_and_what_is_folded(browser, pages):
    open_page(browser, pages["zoo"])
    browsing.emulate(browser, medium="print")
    try:
        shown = browser.execute_script(
            "return [...document.querySelectorAll('.case')].map((c) => [c.open, "
            "c.querySelector('.words').offsetHeight > 0, c.querySelector('.pairs').offsetHeight > 0])"
        )
    finally:
        browsing.emulate(browser)
    assert [False, True, True] in shown and all(words and table for _, words, table in shown), shown


def test_the_zoo_tells_what_was_missed(pages):
    text = pages["zoo"].read_text(encoding="utf-8")
    assert "cures 1" in text and "1 pair in which nothing is wrong it leaves 1 alone" in text
    assert "token_sum bf16: not named" in text and "phase_sum fp16: error" in text and "ValueError: no" in text
    assert "1 &lt; 2 &amp; so" in text


def test_the_index_lists_the_reports_that_are_there(pages):
    folder = pages["index"].parent
    page, told = pages["index"].read_text(encoding="utf-8"), (folder / "README.md").read_text(encoding="utf-8")
    there = sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/index.html"))
    assert there and all(f'href="{p}"' in page and f"]({p})" in told for p in there)
    committed = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert _without_leads(committed) == _without_leads(told), "python reports/make.py --index"


def _without_leads(text: str) -> list[str]:
    """`make demo` replaces a page, and with it the sentence that the index quotes."""
    return [line for line in text.splitlines() if line and not line.startswith("> ")]
