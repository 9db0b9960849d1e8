"""A real browser for tests of the report: how it is started, what it is asked. Files that use it skip by name where
chromium, its driver or selenium is missing (Debian: chromium, chromium-driver)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = not (CHROMIUM and DRIVER)
WHY = "chromium or chromedriver is not installed: the report is not tried in a browser"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
    "--force-prefers-reduced-motion",
)  # fmt: skip
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js")
"""axe-core, the checker of accessible pages: `npm install --no-save axe-core@4` in the repository, or AXE_CORE=FILE."""


def start(folder: Path):
    """A headless browser that keeps what it holds in `folder`; its log says what pages complain of and ask for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    return driver


def emulate(browser, *, width: int = 1280, scheme: str = "light", medium: str = "") -> None:
    """Set the width, colour scheme and medium of the window."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})


def open_page(browser, path: Path, link: str = "") -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri() + link)


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def addresses(browser) -> list[str]:
    """What the page asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def settle(browser) -> None:
    """Wait for the next painted frame."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def saved(browser, selector: str) -> tuple[str, bytes]:
    """(name, content) of the file that a click on `selector` hands out."""
    name, data = browser.execute_async_script(
        """
        const done = arguments[1], make = URL.createObjectURL, click = HTMLAnchorElement.prototype.click;
        let blob = null;
        URL.createObjectURL = (one) => { blob = one; return make.call(URL, one); };
        HTMLAnchorElement.prototype.click = function () {
          URL.createObjectURL = make;
          HTMLAnchorElement.prototype.click = click;
          const reader = new FileReader();
          reader.onload = () => done([this.download, reader.result.split(',')[1] || '']);
          reader.readAsDataURL(blob);
        };
        document.querySelector(arguments[0]).click();
        """,
        selector,
    )
    import base64

    return name, base64.b64decode(data)
