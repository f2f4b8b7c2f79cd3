"""A headless Chromium for tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Any]:
    """A page of Playwright's with a list `problems`: what the console, a script or the network complained about.

    Debian's Chromium or Google's Chrome is driven, because Playwright's own is not in a package. Without one, or
    without Playwright, the test is skipped.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium to open the page in; Debian's package is called chromium")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        page = browser.new_page(**options)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else page.problems.append(r.url))
        page.goto(url)
        yield page
        browser.close()


def overflowing(page: Any) -> list[str]:
    """The elements that stick out of the window to the right, but for those in something that scrolls by itself."""
    return page.evaluate("""() => {
        const scrolls = (e) => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
        return [...document.querySelectorAll("body *")]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
            .map((e) => e.outerHTML.slice(0, 80));
    }""")
