"""Debian's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.processes import ROOT

# Without these Chromium keeps asking for hosts of its maker.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
# The list takes the place of Playwright's own, whose relevant names are repeated. The popups of the address bar would
# be a page of their own beside each page, and take more of the processor than ours.
ABSENT = [
    "WebUIOmniboxPopup",
    "WebUIOmniboxAimPopup",
    "WebUIOmniboxFullPopup",
    "DestroyProfileOnBrowserClose",
    "HttpsUpgrades",
    "MediaRouter",
    "NetworkTimeServiceQuerying",
    "OptimizationHints",
    "PaintHolding",
    "PreconnectToSearch",
]
AXE = ROOT / "node_modules/axe-core/axe.min.js"


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser; without one the test is skipped."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        assert not os.environ.get("CI"), "CI has no Chromium: bin/get-browser failed"
        pytest.skip("no Chromium found")
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers and root do not have; the only page visited is our own.
        args = ["--no-sandbox", *QUIET, f"--disable-features={','.join(ABSENT)}"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=args)
        yield browser
        browser.close()


@contextmanager
def browser_page() -> Iterator[Page]:
    """Open an empty page; without a browser the test is skipped."""
    with open_browser() as browser:
        yield browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")


def axe_violations(page: Page) -> list[str]:
    """Look for what keeps people out; return what axe finds, with where."""
    page.evaluate(AXE.read_text())
    found = page.evaluate(
        "() => axe.run(document, { resultTypes: ['violations'] }).then(({ violations }) => violations)"
    )
    return [f"{each['id']}: {node['target']} {node['failureSummary']}" for each in found for node in each["nodes"]]
