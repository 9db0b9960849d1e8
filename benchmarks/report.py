"""Build the HTML report of synthetic runs and time it in a browser.

    python benchmarks/report.py [--json OUT] [--sites 500 2500 10000] [--keep DIR]

A run of N sites is written by the real writer: layers of experts with five recorded roles each, 20 recorded steps,
shadow prices of outputs and weights, a plan by pattern, two training runs. The table gives the seconds of reading the
run, of gathering and of rendering it, the weight of the page, how long the browser takes until the page can be used,
and the time from an input event of the scale slider to the next painted frame, over all sites at once (role "all",
every site a row of its own), median and worst of 24 moves.

Targets: 10,000 sites in under 20 s and 15 MB; 2,500 (500 modules of 5 roles) in under 8 MB, a repaint of them under
100 ms. Without chromium, chromedriver and selenium the last columns are empty. A browser's times want a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import Target, check, machine, write_json

from precscope import store
from precscope.histogram import BINS, EXP_LO
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.profiles import Profile
from precscope.reporting.html import render, save
from precscope.reporting.view import build_view
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, prepare_directory

ROLES = (Role.INPUT, Role.OUTPUT, Role.WEIGHT, Role.GRAD_OUTPUT, Role.GRAD_WEIGHT)
STEPS, PER_LAYER, ELEMENTS = 20, 25, 1_000_000
MOVES = """
const done = arguments[0], slider = document.getElementById('scale'), times = [];
precscope.set({ role: 'all', alike: false, only: '', filter: '' });
let k = -12;
function move() {
  if (k > 12) return void done(times);
  slider.value = k++;
  const start = performance.now();
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  requestAnimationFrame(() => {  // runs after the page's own repaint in this frame; the message after the paint
    const channel = new MessageChannel();
    channel.port1.onmessage = () => { times.push(performance.now() - start); setTimeout(move, 30); };
    channel.port2.postMessage(0);
  });
}
move();
"""


def made_run(path: Path, sites: int) -> Path:
    """A run directory of `sites` sites."""
    rng = np.random.default_rng(0)
    prepare_directory(path, exist="overwrite")
    names = [f"layers.{i // PER_LAYER}.experts.{i % PER_LAYER}.w1" for i in range(sites // len(ROLES))]
    keys = [Site(name, role) for name in names for role in ROLES]
    gradient = np.asarray([s.role.is_gradient for s in keys])
    centre = np.where(gradient, -24.0, -1.0) + rng.normal(0, 3, len(keys))
    writer, shadow = StatsWriter(path), StatsWriter(path, kind="shadow")
    for step in range(0, STEPS * 50, 50):
        centre = centre + rng.normal(0.05, 0.1, len(keys))
        table = _table(centre, rng)
        writer.write(np.full(len(keys), step), keys, table, np.where(gradient, 65536.0, 1.0), {})
        if step % 500 == 0:
            priced = np.flatnonzero([s.role in (Role.OUTPUT, Role.WEIGHT) for s in keys])
            part = table.take(priced)
            part.weights = np.where(part.counts > 0, 10.0 ** rng.uniform(-9, -5, part.counts.shape), 0.0)
            shadow.write(np.full(len(priced), step), [keys[i] for i in priced], part, np.ones(len(priced)), {})
    about = {
        "schema": 1,
        "status": "done",
        "task": "gpt",
        "model": "Experts",
        "precision": "bf16",
        "seed": 0,
        "every": 50,
    }
    store.write_json(path / "run.json", {**about, "every": 50})
    _log(2.0, 400.0).to_parquet(path / "train.parquet")
    described = [{"name": n, "type": "Linear", "parent": n.rpartition(".")[0], "params": 4096, "own_params": 4096,
                  "flops": 8192, "calls": 1, "elements": 65536, "leaf": True} for n in names]  # fmt: skip
    parameters = [{"name": f"{n}.weight", "shape": [64, 64], "dtype": "float32", "requires_grad": True, "buffer": False,
                   "owners": [n]} for n in names]  # fmt: skip
    edges = [{"producer": a, "consumer": b, "elements": 65536} for a, b in itertools.pairwise(names)]
    store.write_json(path / "graph.json", {"schema": 1, "modules": described, "parameters": parameters, "edges": edges})
    return path


def _table(centre: np.ndarray, rng: np.random.Generator) -> StatsTable:
    """Histograms of about thirty binades around and below 2^centre, as activations have them."""
    counts = np.zeros((len(centre), BINS), np.int64)
    top = np.floor(centre).astype(int) + 2
    for depth in range(30):
        share = np.exp(-0.5 * ((depth - 2) / 1.2) ** 2) if depth < 4 else 0.5 ** (depth - 2)
        counts[np.arange(len(centre)), top - depth - EXP_LO] = rng.poisson(max(ELEMENTS * share, 0.5), len(centre))
    highest = BINS - 1 - (counts[:, ::-1] > 0).argmax(1) + EXP_LO
    lowest = (counts > 0).argmax(1) + EXP_LO
    binades = 4.0 ** (np.arange(BINS) + EXP_LO).clip(-500, 500)
    zeros = np.zeros(len(centre), np.int64)
    return StatsTable(
        counts=counts, zeros=zeros, pos_inf=zeros, neg_inf=zeros, nan=zeros, amax=1.5 * 2.0**highest,
        amin_nonzero=1.1 * 2.0**lowest, sum=zeros.astype(float), sumsq=(counts * binades).sum(1) * 7 / 3,
        source=np.full(len(centre), "fp32"),
    )  # fmt: skip


def _log(end: float, ms: float) -> pd.DataFrame:
    rng, step = np.random.default_rng(1), np.arange(1000)
    return pd.DataFrame({
        "step": step, "loss": end + 3 * np.exp(-step / 80.0) + rng.normal(0, 0.05, 1000), "lr": 1e-3, "scale": 65536.0,
        "skipped": False, "nonfinite": False, "grad_norm": 1.0, "time_ms": ms, "memory_bytes": 10**9,
        "eval_loss": np.nan,
    })  # fmt: skip


def made_training(path: Path, end: float, ms: float) -> Path:
    """A training run of a thousand steps."""
    prepare_directory(path, exist="overwrite")
    _log(end, ms).to_parquet(path / "train.parquet")
    store.write_json(
        path / "run.json", {"schema": 1, "status": "done", "precision": path.name, "seed": 0, "eval_loss": end}
    )
    return path


def made_plan() -> PrecisionPlan:
    """fp16 with one kind of expert in fp32, each with a reason."""
    low = LayerPrecision("fp16", reasons=["fastest allowed (fp16 0.210, fp32 0.412 ms, measured)"])
    high = LayerPrecision("fp32", reasons=["not fp16: output reaches 7.1e4, fp16 ends at 65504"])
    return PrecisionPlan(default=low, modules={"*.experts.3.*": high}, loss_scale={"initial": 2.0**14})


def timed_page(sites: int, folder: Path) -> dict[str, Any]:
    """Build the report of a run of `sites` sites, and drive it in a browser where there is one."""
    run = made_run(folder / f"run{sites}", sites)
    runs = [made_training(folder / "fp32", 2.0, 400.0), made_training(folder / "plan", 2.003, 250.0)]
    start = time.perf_counter()
    profile = Profile.load(run)
    loaded = time.perf_counter()
    view = build_view(profile, plan=made_plan(), runs=runs)
    gathered = time.perf_counter()
    page = save(render(view), folder / f"report{sites}.html")
    done = time.perf_counter()
    row = {
        "sites": sites, "load_s": loaded - start, "gather_s": gathered - loaded, "render_s": done - gathered,
        "total_s": done - start, "page_mb": page.stat().st_size / 1e6, "rows": len(view.sites),
    }  # fmt: skip
    return row | in_browser(page)


def in_browser(page: Path) -> dict[str, float]:
    """{"open_ms", "repaint_ms", "repaint_worst_ms"}, {} where no browser can be driven."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return {}
    if not chromium or not driver:
        return {}
    with tempfile.TemporaryDirectory() as user:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--window-size=1280,900", f"--user-data-dir={user}"):  # fmt: skip
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.set_script_timeout(120)
            browser.get(page.as_uri())
            opened = browser.execute_script(
                "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
            )
            times = browser.execute_async_script(MOVES)[1:]  # the first one warms up
        finally:
            browser.quit()
    return {"open_ms": opened, "repaint_ms": statistics.median(times), "repaint_worst_ms": max(times)}


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    times = "".join(f"{row[name]:>10.2f}" for name in ("load_s", "gather_s", "render_s", "total_s", "page_mb"))
    shown = f"{row['sites']:>7}{row['rows']:>7}{times}"
    if "open_ms" not in row:
        return shown
    return f"{shown}{row['open_ms']:>9.0f}{row['repaint_ms']:>9.0f}, {row['repaint_worst_ms']:.0f}"


def targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What is asked of these sizes."""
    by = {row["sites"]: row for row in rows}
    asked = []
    if 10_000 in by:
        asked.append(Target("seconds, 10,000 sites", by[10_000]["total_s"], 20))
        asked.append(Target("MB, 10,000 sites", by[10_000]["page_mb"], 15))
    if 2500 in by:
        asked.append(Target("MB, 500 modules of 5 roles", by[2500]["page_mb"], 8))
        if "repaint_ms" in by[2500]:
            asked.append(Target("ms to repaint, 500 modules of 5 roles", by[2500]["repaint_ms"], 100))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[500, 2500, 10_000], help="numbers of sites")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--keep", type=Path, help="keep runs and pages in this folder")
    chosen = parser.parse_args()
    rows = []
    print("  sites   rows    read s  gather s  render s   total s   page MB  open ms  repaint ms: median, worst")
    with tempfile.TemporaryDirectory() as temporary:
        for sites in chosen.sites:
            rows.append(timed_page(sites, chosen.keep or Path(temporary)))
            print(line(rows[-1]), flush=True)
    asked = targets(rows)
    check(asked)
    write_json(chosen.json, "report", rows, targets=asked, **machine())


if __name__ == "__main__":
    main()
