"""What the tests in a real browser share: Chromium, a page of it, and pictures of what it shows."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]


@contextmanager
def browsing(height: int = 800, patience_s: int = 60) -> "Iterator[sync_api.Page]":
    """A page of a browser, 1280 wide, that waits so long for what it looks for."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": height})
        page.set_default_timeout(patience_s * 1000)
        yield page
        browser.close()


def picture(page: "sync_api.Page", name: str, **options: bool) -> None:
    """Keep what the page shows, in the directory that EVERGREEN_SCREENSHOTS names."""
    if directory := os.environ.get("EVERGREEN_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(directory) / f"{name}.png", **options)
