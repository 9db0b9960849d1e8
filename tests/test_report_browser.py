"""The report in a real browser: opens from disk, asks no network, answers as Profile.ask does, shows names as text.

Skipped by name where chromium, its driver or selenium is missing (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import math
from pathlib import Path

import browsing
import numpy as np
import pandas as pd
import pytest
from browsing import addresses, complaints, open_page, settle
from test_reporting import HOSTILE, ROUNDED, make_plan, make_run, make_training, model, row_of, table_of

from precscope.formats import format_names
from precscope.histogram import BINS
from precscope.profiles import Profile
from precscope.reporting import numbers, report
from precscope.reporting.html import LIMITS, render, save
from precscope.reporting.view import build_view
from precscope.sites import Role, Site

selenium = pytest.importorskip("selenium", reason="selenium is not installed: the report is not tried in a browser")
pytestmark = pytest.mark.skipif(browsing.MISSING, reason=browsing.WHY)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = browsing.start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def emulate(browser):
    """Set the width, colour scheme and medium of the window; put back afterwards."""
    yield lambda **how: browsing.emulate(browser, **how)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(path of a full report, its profile)"""
    base = tmp_path_factory.mktemp("page")
    modules = [*model(3), (HOSTILE, "Linear", 10, 5000)]
    profile = Profile.load(make_run(base / "a", modules=modules))
    runs = [make_training(base / name, loss=2.0, ms=400.0) for name in ("fp32", "plan")]
    return report(profile, plan=make_plan(modules), runs=runs, out=base / "report.html"), profile


def test_opens_from_disk_without_network_or_complaint(browser, page):
    open_page(browser, page[0])
    browser.execute_script("document.querySelector('details').open = true; window.scrollTo(0, 1e6)")
    asked = addresses(browser)
    assert complaints(browser) == []
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), asked
    assert browser.execute_script("return document.querySelectorAll('#sites tbody tr').length") > 10


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_draws_itself_at_every_width_and_scheme(browser, page, emulate, width, scheme):
    emulate(width=width, scheme=scheme)
    open_page(browser, page[0])
    sizes = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert sizes[0] <= sizes[1] == width, "the page scrolls sideways"
    drawn = browser.execute_script(
        "const c = document.getElementById('map'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const seen = new Set(); for (let i = 0; i < d.length; i += 4) seen.add(d[i] + ',' + d[i+1] + ',' + d[i+2]);"
        "return seen.size"
    )
    assert drawn > 20, "the range map is empty"
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(251, 251, 250)" if scheme == "light" else "rgb(19, 22, 26)")
    assert complaints(browser) == []


def odd_profile(path: Path) -> Profile:
    """Sites that are hard to answer for: every source, shifted gradients, constants, zeros, NaN, extreme values."""
    rng = np.random.default_rng(11)
    sites, rows, shifts = [], [], []
    for i in range(60):
        source = ("fp32", "fp16", "bf16", "fp64", "mixed")[i % 5]
        spread = rng.uniform(0.5, 12)
        x = rng.normal(0, 1, 300) * np.exp2(rng.normal(rng.uniform(-30, 14), spread, 300))
        if source == "fp64" and i % 2:
            x *= np.exp2(rng.integers(-500, 500, 300))
        if source in ROUNDED:
            with np.errstate(over="ignore", under="ignore"):
                x = x.astype(ROUNDED[source])
        if i % 7 == 0:
            x = np.full(50, (1.0, 448.0, 2.0**-25, 65520.0, 3e-8, 0.0, 464.0, 6e-8, 1.5)[i // 7])
        if i % 11 == 0:
            x[:3] = (np.nan, np.inf, 0.0)
        sites.append(Site(f"m{i}", Role.GRAD_OUTPUT if i % 3 else Role.OUTPUT))
        rows.append(row_of(x, source))
        shifts.append(-16 if i % 3 else 0)
    table = table_of(rows).shift(np.array(shifts))
    table.weights = np.where(table.counts > 0, rng.uniform(0, 1, table.counts.shape), 0.0)
    columns = ["step", "module", "role", "call", "amax", "pos_inf", "neg_inf", "nan"]
    return Profile(path, {"model": "odd"}, sites, table, {}, _history=pd.DataFrame(columns=columns))


def test_explorer_answers_as_profile_ask(browser, tmp_path):
    profile = odd_profile(tmp_path)
    path = save(render(build_view(profile)), tmp_path / "odd.html")
    open_page(browser, path)
    names = browser.execute_script("return window.precscope.sites")
    rng = np.random.default_rng(5)
    formats = [f for f in format_names() if f != "fp64"]
    scales = [-40, 0, 40, *rng.integers(-39, 40, 9)]
    asked = [(int(i), str(rng.choice(formats)), int(rng.choice(scales))) for i in rng.integers(0, 60, 1500)]
    told = browser.execute_script("return arguments[0].map(([i, f, k]) => window.precscope.ask(i, f, k))", asked)
    frames: dict = {}
    for (i, fmt, k), answer in zip(asked, told, strict=True):
        if (fmt, k) not in frames:
            frame = profile.ask(fmt, scale_exponent=k)
            frames[fmt, k] = {f"{r.module}.{r.role}": r for r in frame.itertuples()}
        row = frames[fmt, k][names[i]]
        expected = {
            "overflow": numbers.interval(row.overflow_lo, row.overflow_hi),
            "flushed": numbers.percent(row.flushed),
            "subnormal": numbers.percent(row.subnormal),
            "sqnr": numbers.fixed(row.sqnr_db),
            "noise": numbers.number(row.loss_noise),
        }
        assert {key: answer[key] for key in expected} == expected, (names[i], fmt, k)
    assert complaints(browser) == []


def priced_profile(path: Path) -> Profile:
    """A bf16 run with shadow steps whose sites are hard to price: several tensors per site, constants, all-zero and
    infinite weights, tensors without a gradient, parameters of which some were really rounded."""
    rng = np.random.default_rng(23)
    sites, rows, weights, rounded = [], [], [], {f: [] for f in ("fp16", "bf16", "e4m3", "e5m2")}
    for i in range(40):
        role = (Role.OUTPUT, Role.WEIGHT, Role.INPUT)[i % 3]
        for tensor in ("a", "b", "c")[: 1 + i % 3]:
            x = (rng.normal(0, 1, 200) * np.exp2(rng.normal(rng.uniform(-24, 14), 3, 200))).astype(np.float32)
            if rng.random() < 0.25:
                x = np.full(20, rng.choice([1.0, 1.1, 3e-8, 70000.0, 0.0]), np.float32)
            sites.append(Site(f"m{i}", role, i % 2, tensor))
            rows.append(row_of(x))
            price = np.where(rows[-1]["counts"] > 0, 10.0 ** rng.uniform(-12, 2), 0.0) * rng.uniform(0, 1, BINS)
            price *= rng.choice([1.0, 0.0, np.nan, 1.0, 1.0, 1.0])
            if i in (11, 12) and len(x) > 20:
                price[np.argmax(rows[-1]["counts"])] = np.inf
            weights.append(price)
            tried = role is Role.WEIGHT and rng.random() < 0.8
            for squares in rounded.values():
                squares.append(10.0 ** rng.uniform(-9, -3) if tried else np.nan)
    sites.append(Site("unpriced", Role.OUTPUT))
    rows.append(row_of(rng.normal(0, 1, 50)))
    table = table_of(rows)
    shadow = Profile(
        path, {"precision": "fp32"}, sites[:-1], table.take(np.arange(len(sites) - 1)), {},
        rounded={f: np.array(squares) for f, squares in rounded.items()}, _history=pd.DataFrame({"step": [0, 5, 10]}),
    )  # fmt: skip
    shadow.table.weights = np.stack(weights)
    table.source[:] = "bf16"  # what the run itself recorded does not enter the prices
    history = pd.DataFrame(columns=["step", "module", "role", "call", "amax", "pos_inf", "neg_inf", "nan"])
    return Profile(path, {"model": "priced"}, sites, table, {}, shadow=shadow, _history=history)


def test_explorer_prices_as_profile_ask(browser, tmp_path):
    profile = priced_profile(tmp_path)
    told = told_noise(browser, profile, tmp_path)
    for (name, fmt, k), (said, value) in told.items():
        assert said == numbers.number(value), (name, fmt, k)
    values = np.array([value for _, value in told.values()])
    assert np.isnan(values).any() and (values == 0).any() and np.isinf(values).any() and (values > 0).mean() > 0.5


def test_explorer_prices_a_real_run(browser, tmp_path):
    """A model with norms, whose parameters were really rounded, trained in bf16 with shadow steps."""
    import torch
    from torch import nn

    import precscope as ps

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
    batches = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(6)]
    task = ps.Task(model=model, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batches=batches)
    run = ps.profile(task, out=tmp_path / "run", steps=6, every=2, shadow_every=2, costs=False, note=lambda text: None)
    told = told_noise(browser, run, tmp_path)
    for asked, (said, value) in told.items():
        assert (said == numbers.MISSING) == math.isnan(value), asked
        if said != numbers.MISSING:
            assert float(said) == pytest.approx(value, rel=6e-4), asked  # four digits, of weights with seven
    assert all(told[site, "bf16", 0][1] > 0 for site in ("1.weight", "1.output", "3.output"))
    assert told["1.grad_output", "bf16", 0][0] == numbers.MISSING


def told_noise(browser, profile: Profile, folder: Path) -> dict:
    """(site, format, k) -> (what the page says of loss noise, what Profile.ask says); NaN where not priced."""
    open_page(browser, save(render(build_view(profile)), folder / "priced.html"))
    names = browser.execute_script("return window.precscope.sites")
    asked = [(i, f, k) for i in range(len(names)) for f in ("fp16", "bf16", "e4m3", "e5m2", "e3m2") for k in (0, -3, 9)]
    told = browser.execute_script("return arguments[0].map(([i, f, k]) => window.precscope.ask(i, f, k).noise)", asked)
    truth = {}
    for fmt, k in {(f, k) for _, f, k in asked}:
        for row in profile.ask(fmt, scale_exponent=k).itertuples():
            call = f"#{row.call}" if row.call else ""
            truth[f"{row.module or '(root)'}{call}.{row.role}", fmt, k] = row.loss_noise
    assert complaints(browser) == []
    keys = [(names[i], f, k) for i, f, k in asked]
    return {key: (said, truth[key]) for key, said in zip(keys, told, strict=True)}


def test_controls_change_the_table(browser, page):
    """The same through the page's own controls: format, role, scale, filter, sorting, a row's details."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    path, profile = page
    open_page(browser, path)
    browser.find_element(By.CSS_SELECTOR, "input[value=e5m2]").send_keys(Keys.SPACE)
    Select(browser.find_element(By.ID, "role")).select_by_value("grad_output")
    slider = browser.find_element(By.ID, "scale")
    for _ in range(12):
        slider.send_keys(Keys.ARROW_RIGHT)
    browser.find_element(By.ID, "filter").send_keys("fc2")
    settle(browser)
    rows = browser.execute_script(
        "const rows = [...document.querySelectorAll('#sites tbody tr[data-index]')];"
        "return rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    frame = profile.ask("e5m2", scale_exponent=12, roles=["grad_output"]).set_index("module")
    assert {r[0] for r in rows} == {f"blocks.{i}.mlp.fc2" for i in range(3)}
    for name, _, overflow, flushed, subnormal, sqnr, room in rows:
        row = frame.loc[name]
        assert overflow == numbers.interval(row.overflow_lo, row.overflow_hi)
        assert (flushed, subnormal) == (numbers.percent(row.flushed), numbers.percent(row.subnormal))
        assert sqnr == numbers.fixed(row.sqnr_db)
        assert room == numbers.fixed(math.log2(57344 / row.amax) - 12)
    browser.find_element(By.CSS_SELECTOR, "th[data-key=site] button").send_keys(Keys.ENTER)
    settle(browser)
    order = browser.execute_script("return [...document.querySelectorAll('#sites tbody th')].map(c => c.textContent)")
    assert order == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    head = browser.find_element(By.CSS_SELECTOR, "th[data-key=site]")
    assert head.get_attribute("aria-sort") == "ascending"
    browser.find_elements(By.CSS_SELECTOR, "#sites tbody button")[1].send_keys(Keys.ENTER)
    settle(browser)
    detail = browser.find_element(By.ID, "detail").text
    assert "blocks.1.mlp.fc2" in detail and "not fp16: its output reaches" in detail
    assert "f=e5m2" in browser.current_url and "s=blocks.1.mlp.fc2.grad_output" in browser.current_url


def test_deep_links_restore_the_view(browser, page):
    open_page(browser, page[0], "#f=bf16&k=-3&r=weight&s=head.weight&q=head")
    state = browser.execute_script(
        "return [document.querySelector('input[name=format]:checked').value, document.getElementById('scale').value,"
        " document.getElementById('role').value, document.querySelector('#detail h3').textContent]"
    )
    assert state == ["bf16", "-3", "weight", "head"]
    open_page(browser, page[0], "#f=nonsense&k=99&r=__proto__&s=x")
    assert complaints(browser) == []
    assert browser.execute_script("return document.getElementById('role').value") == "output"


def test_hostile_names_are_text(browser, page):
    open_page(browser, page[0], "#f=fp16&k=0&r=all")
    browser.execute_script("window.precscope.set({ filter: 'onerror', role: 'all', shown: 1000 })")
    browser.execute_script("document.querySelector('#sites tbody button').click()")
    settle(browser)
    shown = browser.execute_script("return document.querySelector('#detail h3').textContent")
    assert shown == HOSTILE
    assert browser.execute_script("return [window.hacked === undefined, document.images.length]") == [True, 0]
    titles = browser.execute_script("return [...document.querySelectorAll('#sites tbody button')].map(b => b.title)")
    assert f"{HOSTILE}.output" in titles
    assert complaints(browser) == []


def test_csv_holds_the_table_and_no_formula(browser, page):
    open_page(browser, page[0])
    text = browser.execute_async_script(
        "const done = arguments[0], make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then(done); return make.call(URL, blob); };"
        "document.getElementById('csv').click();"
    )
    lines = text.split("\r\n")
    frame = page[1].ask("fp16", roles=["output"])
    assert lines[0].startswith('"module","role","call","format"') or lines[0].startswith("module,role,call,format")
    assert len([line for line in lines if line]) == len(frame) + 1
    assert not [line for line in lines if line.startswith(("=", "+", "-", "@"))]


def test_slider_repaints_500_modules_of_5_roles(browser, tmp_path, emulate):
    """All at once: the table is the one that the last scale asks for. benchmarks/report.py times it."""
    emulate(width=1280)
    modules = [(f"layers.{i}.linear", "Linear", 100, 1000) for i in range(500)]
    path = report(make_run(tmp_path / "a", modules=modules, steps=2, n=300), out=tmp_path / "a.html")
    open_page(browser, path)
    browser.execute_script("for (let k = -6; k <= 6; k++) precscope.set({ role: 'all', format: 'e4m3', k })")
    assert browser.execute_script("return document.getElementById('count').textContent") == "2500 sites"
    told = browser.execute_script("return [...document.querySelectorAll('#words button')].map(b => b.textContent)")
    frame = Profile.load(tmp_path / "a").ask("e4m3", scale_exponent=6)
    beyond = (frame.overflow_lo > 0).sum()
    assert f"overflows {beyond}" in told
    assert f"flushes {((frame.overflow_hi == 0) & (frame.flushed > LIMITS['flushed'])).sum()}" in told


def test_prints_the_whole_map_on_white(browser, page, emulate):
    emulate(width=1280, medium="print")
    open_page(browser, page[0])
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    height, rows, bar = browser.execute_script(
        "return [document.getElementById('map').clientHeight, document.getElementById('map-sizer').clientHeight,"
        " getComputedStyle(document.getElementById('controls')).display]"
    )
    assert height >= rows and bar == "none"
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_prints_dark_ink_from_a_dark_screen(browser, page, emulate):
    """Canvases are drawn before the medium changes: on the event they must know that the paper is white."""
    ink = "return getComputedStyle(document.documentElement).getPropertyValue('--ink')"
    emulate(width=1280)
    open_page(browser, page[0])
    light = browser.execute_script(ink)
    emulate(width=1280, scheme="dark")
    open_page(browser, page[0])
    assert browser.execute_script(ink) != light
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(ink) == light
    emulate(width=1280, scheme="dark", medium="print")
    assert browser.execute_script(ink) == light
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    emulate(width=1280, scheme="dark")
    assert browser.execute_script(ink) != light


def test_tables_and_controls_have_names(browser, page):
    """What a screen reader needs: named controls, headed tables, one h1, labelled regions and pictures."""
    open_page(browser, page[0])
    missing = browser.execute_script("""
        const out = [], all = (what) => document.querySelectorAll(what);
        const said = (e) => (e.getAttribute('aria-label') || e.textContent || e.title || '').trim();
        const named = (e) => said(e) || e.labels?.length || e.hasAttribute('aria-labelledby');
        for (const e of all('button, select, input, [role=region], [role=img], aside'))
          if (e.checkVisibility() && !named(e)) out.push(e.outerHTML.slice(0, 80));
        for (const e of all('th')) if (!e.hasAttribute('scope')) out.push('th without scope');
        for (const e of all('table')) if (!e.caption) out.push('table without caption');
        for (const e of all('section')) if (!document.getElementById(e.getAttribute('aria-labelledby'))) out.push(e.id);
        if (all('h1').length !== 1) out.push('h1');
        return out;
    """)
    assert missing == []
