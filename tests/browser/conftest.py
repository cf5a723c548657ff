"""A real Chromium, driven by Playwright. `.ci/run` installs it and runs these tests."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_CONVENTION = re.compile(r"https?://(127\.0\.0\.1|localhost)(:\d+)?/|data:|blob:|file:|about:")


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page; the console must stay silent, and nothing may be asked of another host."""
    context = await browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page = await context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.extend([message.text] if message.type in ("error", "warning") else []))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.extend([] if _CONVENTION.match(request.url) else [request.url]))
    yield page
    await context.close()
    assert not [text for text in said if getattr(page, "expected", "\0") not in text]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: the folder that the run keeps, if it names one."""
    folder = Path(os.environ.get("RHAPSODY_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
