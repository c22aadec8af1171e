"""Fixtures for the HTML pages: headless Chromium, driven by playwright. Imported by the conftest of each suite."""

import shutil

import pytest


# One browser a module, not one a session: playwright's event loop stays "running" in the main thread as long as the
# browser is open, and tests of other modules may want a loop of their own.
@pytest.fixture(scope="module")
def browser():
    """The system's Chromium without a window; tests that need it are skipped where there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="browser tests need playwright: pip install -e .[test]"
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("browser tests need Chromium, and neither chromium nor google-chrome is on the PATH")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=600_000)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A fresh page (1280 x 800). The test fails if a script of the page throws or the console shows an error.

    `page.requests_made` lists the addresses of everything the page asked for; going to a page is not counted.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(300_000)  # ms; for what takes some on a quiet machine
    errors, page.requests_made = [], []
    page.on("pageerror", lambda error: errors.append(f"uncaught: {error}"))
    page.on("console", lambda message: errors.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def record(request) -> None:
        if not (request.is_navigation_request() and request.frame == page.main_frame):
            page.requests_made.append(request.url)

    page.on("request", record)
    yield page
    context.close()
    assert not errors, "\n".join(errors)
