"""Debian's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, sync_playwright

# Without these Chromium keeps asking for hosts of its maker.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@contextmanager
def browser_page() -> Iterator[Page]:
    """Open an empty page; without a browser the test is skipped."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        assert not os.environ.get("CI"), "CI has no Chromium: bin/get-browser failed"
        pytest.skip("no Chromium found")
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers and root do not have; the only page visited is our own.
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", *QUIET])
        yield browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme="light")
        browser.close()
