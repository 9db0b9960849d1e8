"""The report's page in a real browser, beyond the numbers (test_report_browser.py): rows for those alike, verdicts as
filters, pages of the table, growth over steps, links, training charts, tables to view and download, access for all."""

from __future__ import annotations

import csv
import importlib
import io
import math
from pathlib import Path

import browsing
import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import complaints, open_page, saved, settle
from reported import made_plan, recorded_run, training_runs

from precscope.profiles import Profile
from precscope.reporting import numbers, report
from precscope.reporting.html import render, save
from precscope.reporting.view import build_view

pytest.importorskip("selenium", reason="selenium is not installed: the report is not tried in a browser")
pytestmark = pytest.mark.skipif(browsing.MISSING, reason=browsing.WHY)
TABLE = """
return [...document.querySelectorAll('#sites tbody tr[data-index]')].map(r => [...r.cells].map(c => c.textContent))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = browsing.start(tmp_path_factory.mktemp("chromium"))
    browsing.emulate(driver)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page with everything, its profile)"""
    base = tmp_path_factory.mktemp("made")
    run = recorded_run(base / "rec")
    page = report(run, plan=made_plan(run), runs=training_runs(base), out=base / "report.html")
    return page, Profile.load(run)


def by_id(browser, name: str):
    return browser.find_element("id", name)


def press(browser, element) -> None:
    """A click, wherever the page has scrolled to."""
    browser.execute_script("arguments[0].click()", element)


def table(browser) -> list[list[str]]:
    settle(browser)
    return browser.execute_script(TABLE)


def test_rows_alike_answer_for_all_their_sites(browser, made):
    page, profile = made
    open_page(browser, page, "#f=e4m3&k=0&r=output&g=1&o=site")
    rows = {r[0]: r for r in table(browser)}
    assert len(rows) == 7 and by_id(browser, "count").text == "15 of 73 sites in 7 rows"
    frame = profile.ask("e4m3", roles=["output"])
    some = frame[frame.module.str.fullmatch(r"blocks\.\d\.mlp\.fc2")]
    count = some["count"].sum()
    shares = {
        c: (some[c] * some["count"]).sum() / count for c in ("overflow_lo", "overflow_hi", "flushed", "subnormal")
    }
    _, word, overflow, flushed, subnormal, sqnr, noise, room = rows["blocks.*.mlp.fc2"]
    assert word == "overflows 1/3"
    assert overflow == numbers.interval(shares["overflow_lo"], shares["overflow_hi"])
    assert (flushed, subnormal) == (numbers.percent(shares["flushed"]), numbers.percent(shares["subnormal"]))
    assert noise == numbers.number(math.sqrt((some.loss_noise**2).sum()))
    assert room == numbers.fixed(math.log2(448 / some.amax.max()))
    assert some.sqnr_db.min() <= float(sqnr) <= some.sqnr_db.max() + 0.05
    assert rows["head"][1] == "fits", "a site without a like stays itself"
    press(browser, by_id(browser, "alike"))
    assert len(table(browser)) == 15
    assert complaints(browser) == []


def test_a_row_of_those_alike_opens_its_worst_and_then_all(browser, made):
    open_page(browser, made[0], "#f=fp16&k=3&r=output&g=1")
    press(browser, browser.find_element("xpath", "//table[@id='sites']//button[contains(text(), 'fc2')]"))
    settle(browser)
    detail = by_id(browser, "detail")
    assert detail.find_element("tag name", "h3").text == "blocks.1.mlp.fc2"
    assert "The worst of 3 alike" in detail.text
    press(browser, detail.find_element("xpath", ".//button[text()='Show each']"))
    assert {r[0] for r in table(browser)} == {f"blocks.{i}.mlp.fc2" for i in range(3)}


def test_verdicts_filter_rows_and_count_them(browser, made):
    open_page(browser, made[0], "#f=fp16&k=1&r=output")
    words = {b.get_attribute("data-word"): b for b in by_id(browser, "words").find_elements("tag name", "button")}
    counts = {w: int(b.text.split()[-1]) for w, b in words.items()}
    assert counts["overflows"] == 1 and sum(counts.values()) == 15
    press(browser, words["overflows"])
    assert [r[0] for r in table(browser)] == ["blocks.1.mlp.fc2"]
    assert words["overflows"].get_attribute("aria-pressed") == "true" and "v=overflows" in browser.current_url
    browser.execute_script("precscope.set({ k: -5 })")
    assert table(browser) == []
    assert "No site matches" in by_id(browser, "sites").text


def test_links_restore_everything_chosen(browser, made):
    link = "#f=e5m2&k=-4&r=all&q=mlp&v=tight&o=-flushed&g=1&m=steps&s=blocks.1.mlp.fc2.output"
    open_page(browser, made[0], link)
    settle(browser)
    chosen = browser.execute_script("""
        const checked = (name) => document.querySelector(`input[name=${name}]:checked`).value;
        const value = (id) => document.getElementById(id).value;
        return [checked('format'), value('scale'), value('role'), value('filter'), checked('map'),
                document.getElementById('alike').checked, document.querySelector('#detail h3').textContent,
                document.querySelector('[data-key=flushed]').getAttribute('aria-sort'),
                document.querySelector('#words [aria-pressed=true]').dataset.word]
    """)
    assert chosen == ["e5m2", "-4", "all", "mlp", "steps", True, "blocks.1.mlp.fc2", "ascending", "tight"]
    browser.execute_script("document.getElementById('filter').dispatchEvent(new Event('input'))")
    settle(browser)
    assert browser.current_url.endswith(link), "what a page remembers is what it was opened with"
    open_page(browser, made[0], "#f=fp16&v=__proto__&o=constructor&m=x&g=x&q=%3Cimg%3E")
    assert complaints(browser) == []


def test_pages_of_the_table_hold_every_site_once(browser, made):
    open_page(browser, made[0], "#f=fp16&k=0&r=all&o=site")
    first = table(browser)
    assert len(first) == 50 and by_id(browser, "page-text").text == "Rows 1 to 50 of 73"
    press(browser, by_id(browser, "page-on"))
    second = table(browser)
    assert len(second) == 23 and not by_id(browser, "page-on").is_enabled()
    names = [tuple(r[:1]) + tuple(r[1:2]) for r in first + second]
    assert len(names) == 73
    browser.execute_script("precscope.set({ filter: 'head' })")
    assert len(table(browser)) == 5 and not by_id(browser, "pages").is_displayed(), "back on a page that is"
    open_page(browser, made[0], "#f=fp16&k=0&r=all&o=site&s=head.grad_weight")
    settle(browser)
    chosen = browser.execute_script("return document.querySelector('#sites tr.chosen th').textContent")
    assert chosen == "headgrad weight", "the link opens the page that the site is on"


def test_growth_over_steps_is_drawn_and_told(browser, made):
    open_page(browser, made[0], "#f=e4m3&k=0&r=output")
    count = (
        "const c = document.getElementById('map'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 0; i < d.length; i += 4) if (d[i] > 190 && d[i+1] < 150 && d[i+2] < 110) n++; return n"
    )
    browser.find_element("css selector", "input[value=steps]").send_keys(" ")
    settle(browser)
    with_overflow = browser.execute_script(count)
    browser.execute_script("precscope.set({ format: 'bf16' })")
    settle(browser)
    assert with_overflow > 1000 > browser.execute_script(count), "steps beyond e4m3 are in the colour of overflow"
    tip = browser.execute_script("""
        const canvas = document.getElementById('map'), box = canvas.getBoundingClientRect();
        const row = precscope.sites.filter((n) => n.endsWith('.output')).indexOf('blocks.1.mlp.fc2.output');
        const at = { clientX: box.right - 12, clientY: box.top + 17 * row + 8, bubbles: true };
        canvas.dispatchEvent(new PointerEvent('pointermove', at));
        return document.getElementById('tip').textContent;
    """)
    amax = made[1].ask("fp16", roles=["output"]).set_index("module").amax["blocks.1.mlp.fc2"]
    name, value = tip.split(" · step 70: ")
    assert name == "blocks.1.mlp.fc2.output" and float(value) == pytest.approx(amax, rel=0.005)


def test_each_tensor_may_have_a_scale_of_its_own(browser, made):
    """As 8-bit formats are used: the largest power of two that lets none overflow."""
    from precscope.advice.loss_scale import largest_scale
    from precscope.formats import get_format

    page, profile = made
    open_page(browser, page, "#f=e4m3&k=own&r=all&g=0&o=site")
    press(browser, browser.find_element("css selector", "#sizes option[value='200']"))
    browser.execute_script("precscope.set({ shown: 200 })")
    rows = {r[0]: r[1:] for r in table(browser)}
    sites, stats = profile.merged()
    fmt = get_format("e4m3")
    scales = np.array([largest_scale(a, fmt) for a in stats.amax])
    answers = stats.ask(fmt, scale_exponent=scales)
    assert len(rows) == len(sites) == 73
    for i, site in enumerate(sites):
        word, overflow, flushed, subnormal, sqnr, _, room = rows[
            (site.module or "(root)") + site.role.replace("_", " ")
        ]
        assert overflow == "0" and 0 <= float(room) <= 1.2
        assert word == ("flushes" if answers["flushed"][i] > 0.01 else "fits")
        assert (flushed, subnormal) == tuple(numbers.percent(answers[n][i]) for n in ("flushed", "subnormal"))
        assert sqnr == numbers.fixed(answers["sqnr_db"][i])
    assert not by_id(browser, "scale").is_enabled() and "k=own" in browser.current_url
    press(browser, by_id(browser, "scale-reset"))
    settle(browser)
    assert by_id(browser, "scale").is_enabled() and "k=0" in browser.current_url


def test_a_sites_formats_evidence_and_counts(browser, made):
    page, profile = made
    open_page(browser, page, "#f=fp16&k=0&r=output&s=blocks.1.mlp.fc2.output")
    settle(browser)
    detail = by_id(browser, "detail")
    rows = [r.text.split() for r in detail.find_elements("css selector", ".formats tbody tr")]
    assert [r[0] for r in rows] == ["fp16", "bf16", "e4m3", "e5m2"]
    for fmt, *_, flushed, sqnr, noise in rows:
        answer = profile.ask(fmt, roles=["output"]).set_index("module").loc["blocks.1.mlp.fc2"]
        told = numbers.percent(answer.flushed), numbers.fixed(answer.sqnr_db), numbers.number(answer.loss_noise)
        assert (flushed, sqnr, noise) == told
    assert "Not allowed\nfp16" in detail.text and "not fp16: output reaches" in detail.text
    press(browser, detail.find_element("css selector", "details.counts summary"))
    settle(browser)
    cells = detail.find_elements("css selector", "details.counts td.num")
    total = sum(int(c.get_attribute("textContent").replace(",", "")) for c in cells)
    sites, counts = profile.merged()
    where = next(i for i, s in enumerate(sites) if str(s) == "blocks.1.mlp.fc2.output")
    assert total == counts.counts[where].sum()
    pick = detail.find_element("xpath", ".//div[contains(@class, 'formats')]//button[text()='e4m3']")
    browser.execute_script("arguments[0].focus()", pick)
    press(browser, pick)
    settle(browser)
    assert "f=e4m3" in browser.current_url
    focused = browser.execute_script("return document.activeElement.textContent")
    assert focused == "e4m3", "the keyboard stays where it was"


def test_training_charts_draw_bands_stairs_and_marks(browser, made):
    open_page(browser, made[0])
    drawn = browser.execute_script("""
        const all = (what) => document.querySelectorAll(what).length;
        return [all('#loss-chart path[stroke=none]'), all('#loss-chart circle'),
                all('#difference-chart path[stroke=none]'), all('#scale-chart path'), all('#lanes-chart path'),
                document.getElementById('lanes-chart').ariaLabel,
                document.getElementById('rate-chart').ariaLabel]
    """)
    bands, circles, differences, scales, marks, lanes, rate = drawn
    assert (bands, circles, differences, scales) == (4, 16, 3, 2)
    assert marks == 4 + 2 + 1 + 3
    assert "fp16: 4 skipped, 2 non-finite steps, 0 events of the guard" in lanes
    assert "plan: 1 skipped, 0 non-finite steps, 3 events of the guard" in lanes
    assert rate.startswith("Steps per second: fp32 from 2.")
    assert complaints(browser) == []


def test_every_table_can_be_viewed(browser, made):
    open_page(browser, made[0])
    buttons = browser.find_elements("css selector", "#tables button[data-table]")
    names = [b.get_attribute("data-table") for b in buttons]
    assert names[:2] == ["sites", "history"] and len(names) == 11
    for button in buttons:
        browser.execute_script("arguments[0].click()", button)
        rows = browser.execute_script("return document.querySelectorAll('#viewer-table tbody tr').length")
        count = button.find_element("xpath", "../../td[2]").text.replace(",", "")
        assert rows == min(int(count), 50)
    assert browser.execute_script("return document.activeElement.id") == "viewer-title"
    browser.execute_script("document.querySelector('[data-table=sites]').click()")
    browser.execute_script("document.getElementById('table-on').click()")
    assert by_id(browser, "table-text").text == "Rows 51 to 73 of 73"
    browser.execute_script("document.getElementById('table-close').click()")
    assert not by_id(browser, "viewer").is_displayed()


def test_csv_and_parquet_of_sites_say_the_same(browser, made):
    page, profile = made
    open_page(browser, page, "#f=e5m2&k=2&r=output")
    row = "#tables tr:nth-child(1) "
    name, data = saved(browser, f"{row}button:nth-of-type(2)")
    assert name == "precscope-sites.csv"
    told = list(csv.DictReader(io.StringIO(data.decode())))
    name, data = saved(browser, f"{row}button:nth-of-type(3)")
    assert name == "precscope-sites.parquet"
    frame = pq.read_table(io.BytesIO(data)).to_pandas()
    assert len(told) == len(frame) == len(profile.merged()[0])
    assert [r["histogram"] for r in told] == [" ".join(map(str, h)) for h in frame.histogram]
    assert [float(r["amax"]) for r in told] == frame.amax.tolist()
    asked = {(r.module, r.role): r for r in profile.ask("e5m2", scale_exponent=2).itertuples()}
    for r in told:
        answer = asked[r["module"], r["role"]]
        assert float(r["flushed"]) == pytest.approx(answer.flushed, rel=1e-12, abs=1e-15)
        assert float(r["sqnr_db"]) == pytest.approx(answer.sqnr_db, rel=1e-9)
        assert (r["loss_noise"] == "") == math.isnan(answer.loss_noise)


def test_csv_of_history_and_of_events(browser, made):
    open_page(browser, made[0])
    name, data = saved(browser, "#tables tr:nth-child(2) button:nth-of-type(2)")
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    history = made[1].history()
    assert name == "precscope-history.csv" and len(rows) == len(history)
    exact = {(h.module, h.role, h.step): h.amax for h in history.itertuples()}
    told = np.array([[float(r["amax"]), exact[r["module"], r["role"], int(r["step"])]] for r in rows])
    assert np.abs(told[:, 0] / told[:, 1] - 1).max() < 0.01
    events = browser.execute_script("return [...document.querySelectorAll('#tables th')].map(t => t.textContent)")
    _, data = saved(browser, f"#tables tr:nth-child({events.index('events') + 1}) button:nth-of-type(2)")
    assert [r["action"] for r in csv.DictReader(io.StringIO(data.decode()))] == ["none", "promote", "rollback"]


def test_csv_cells_are_no_formulas(browser, tmp_path):
    run = recorded_run(tmp_path / "rec", layers=1, steps=2, growing="")
    view = build_view(run, title="=1+1")
    open_page(browser, save(render(view), tmp_path / "a.html"))
    text = browser.execute_async_script("""
        const done = arguments[0], make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { blob.text().then(done); return make.call(URL, blob); };
        precscope.saveCsv('a', ['x'], [['=1+1'], ['-2.5'], ['@a'], [-1e-300], [NaN], [-Infinity], ['a "b", c']]);
    """)
    assert text.split("\r\n")[1:-1] == [
        '"\'=1+1"', '"-2.5"', '"\'@a"', '"-1e-300"', '""', '"-inf"', '"a ""b"", c"',
    ]  # fmt: skip


def test_everything_can_be_reached_and_worked_by_keyboard(browser, made):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, made[0], "#f=fp16&k=0&r=output&o=site&s=head.output")
    settle(browser)
    unreachable = browser.execute_script("""
        return [...document.querySelectorAll('[tabindex="-1"]')].filter((e) => e.id !== 'viewer-title').length
    """)
    assert unreachable == 0
    keys = ActionChains(browser)
    browser.execute_script("document.getElementById('map-scroller').focus({ preventScroll: true })")
    keys.send_keys(Keys.HOME, Keys.ARROW_DOWN).perform()
    settle(browser)
    assert browser.execute_script("return document.querySelector('#detail h3').textContent") == "tok"
    browser.execute_script("document.getElementById('alike').focus()")
    keys = ActionChains(browser)
    keys.send_keys(Keys.SPACE).perform()
    assert len(table(browser)) == 7


@pytest.mark.skipif(not browsing.AXE.is_file(), reason="axe-core is not installed (npm install --no-save axe-core@4)")
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious(browser, made, width, scheme):
    browsing.emulate(browser, width=width, scheme=scheme)
    open_page(browser, made[0], "#f=fp16&k=1&r=output&s=blocks.1.mlp.fc2.output")
    settle(browser)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.execute_script("document.querySelector('[data-table=events]').click()")
    settle(browser)
    browser.execute_script(browsing.AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run(document).then(arguments[0])")
    browsing.emulate(browser)
    assert len(found["passes"]) > 20
    bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    told = [
        f"{v['id']} ({v['impact']}): {n['html'][:150]} {n['failureSummary'][-200:]}"
        for v in bad
        for n in v["nodes"][:4]
    ]
    assert not bad, "\n".join(told)


@pytest.mark.slow
def test_ten_thousand_sites_stay_usable(browser, tmp_path, monkeypatch):
    """The run of benchmarks/report.py: under 15 MB, aggregated, which it says, and every site at hand."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    synthetic = importlib.import_module("report")
    view = build_view(synthetic.made_run(tmp_path / "run", 10_000), plan=synthetic.made_plan())
    page = save(render(view), tmp_path / "a.html")
    assert page.stat().st_size < 15_000_000
    open_page(browser, page)
    assert "10,000 sites were recorded: those whose names differ only" in by_id(browser, "ranges").text
    assert by_id(browser, "count").text == "2000 of 10000 sites in 1 row" and len(table(browser)) == 1
    browser.execute_script("precscope.set({ role: 'all', alike: false })")
    assert by_id(browser, "page-text").text == "Rows 1 to 50 of 10000" and len(table(browser)) == 50
    browser.execute_script("precscope.set({ filter: 'layers.79.experts.24. grad_weight' })")
    assert [r[0] for r in table(browser)] == ["layers.79.experts.24.w1grad weight"]
    assert complaints(browser) == []
