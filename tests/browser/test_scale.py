"""A session with as many tasks as a session may have, on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page

from tests.browser.sessions import call, local_session, served, shows

pytestmark = [pytest.mark.ci, pytest.mark.anyio]
IDENTITY = "def identity(n):\n    return n"
HALF = 49_999
"""With the for_each itself, the most that may wait at once; two of them are nearly the most that a session may have."""
DRAWN = """() => {
    const {stream, spans} = page;
    const began = performance.now();
    for (let count = 0; count < 5; count++) stream.paint();
    const context = stream.canvas.getContext("2d");
    const {data} = context.getImageData(0, 0, stream.canvas.width, stream.canvas.height);
    let colored = 0;
    for (let at = 0; at < data.length; at += 4) {
        const parts = data.slice(at, at + 3);
        colored += Math.max(...parts) - Math.min(...parts) > 40;
    }
    return {rows: spans.rows, paint_ms: (performance.now() - began) / 5, colored};
}"""


async def test_a_hundred_thousand_tasks_are_all_there_and_stay_when_zoomed(page: Page, pictures: Path) -> None:
    page.expected = "willReadFrequently"  # type: ignore[attr-defined]  # the test reads the picture back
    with served() as (address, dashboard):
        async with local_session(page, address) as client:
            for name in ("first", "second"):
                sweep = {"name": name, "source": IDENTITY, "for_each": list(range(HALF)), "args": [{"item": True}]}
                await call(client, "submit_tasks", session="session-1", tasks=[sweep], force=True)
                reply: dict[str, Any] = {"counts": {}}
                while reply["counts"].get("DONE", 0) % HALF or not reply["counts"].get("DONE"):
                    reply = await call(client, "wait_tasks", session="session-1", timeout_s=50)
            await page.goto(dashboard)
            await shows(page, "#chips", f"{2 * HALF:,} DONE")
            await page.screenshot(path=pictures / "many.png", full_page=True)
            drawn = await page.evaluate(DRAWN)
            print(f"100,000 tasks: {drawn['paint_ms']:.1f} ms to paint the task stream")  # noqa: T201
            assert drawn["rows"] == 2 * HALF and drawn["colored"] > 1000
            await page.focus("#stream")
            for _ in range(12):
                await page.keyboard.press("+")
            zoomed = await page.evaluate(DRAWN)
            assert zoomed["rows"] == 2 * HALF and zoomed["colored"] > 1000
            await page.fill("#filter", "second[49")
            await shows(page, "#task-note", "of 1,110")
