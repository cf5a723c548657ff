"""The report of a session: one file that a browser opens from the disk, without a network."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
from playwright.async_api import Page

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.dashboard.report import write_report
from rhapsody_mcp.dashboard.trace import chrome_trace
from rhapsody_mcp.dashboard.view import SessionView
from tests.browser.sessions import shows
from tests.browser.test_page import HOSTILE

pytestmark = [pytest.mark.ci, pytest.mark.anyio]
PACKAGES = os.environ.get("RHAPSODY_NODE_PACKAGES")
PARSE = """
import * as Trace from "@paulirish/trace_engine";
import fs from "fs";
const {traceEvents} = JSON.parse(fs.readFileSync(process.argv[2]));
const model = Trace.TraceModel.Model.createWithAllHandlers();
await model.parse(traceEvents, {metadata: {}});
console.log(JSON.stringify(model.parsedTrace(0).traceEvents.filter((event) => event.ph === "X").length));
"""


def square(number: int) -> int:
    if number == 7:
        raise ValueError(HOSTILE)
    return number * number


async def view_of_a_session() -> SessionView:
    """With hostile names, which only Python can give."""
    async with Session([await LocalExecutionBackend(num_workers=2)], uid="study") as session:
        tasks = [ComputeTask(square, args=(number,), name=f"square-{number}") for number in range(20)]
        named = ComputeTask(square, args=(3,), name=HOSTILE)
        total = ComputeTask(sum, args=([task for task in tasks if task.name != "square-7"],), name="total")
        await session.submit_tasks([*tasks, named, total])
        await session.wait_tasks([*tasks, named, total])
        view = SessionView(session, "study")
        await view.catch_up()
        return view


async def test_the_report_is_opened_from_the_disk_and_its_tasks_are_clickable(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "study.html"
    file.write_text(write_report(await view_of_a_session(), {}), encoding="utf-8")
    await page.context.set_offline(True)
    await page.goto(file.as_uri())
    await shows(page, "#status", "as of")
    await shows(page, "#chips", "21 DONE")
    await page.click("#failure-groups summary")
    await page.locator("#failure-groups .list button").click()
    await shows(page, "#detail-body", HOSTILE)
    await page.click("#detail-close")
    await page.fill("#filter", "square-1")
    await shows(page, "#task-note", "of 11")
    await page.locator("#task-table").get_by_role("button", name="square-12").click()
    await shows(page, "#detail-body", "144")
    await page.click("#detail-close")
    await page.fill("#filter", "window.hacked")
    await page.locator("#task-table button").click()
    await shows(page, "#detail-title", HOSTILE)
    assert await page.evaluate("[window.hacked, document.images.length, document.scripts.length]") == [None, 0, 2]


async def test_the_trace_engine_of_chromes_developer_tools_reads_the_trace(tmp_path: Path) -> None:
    if PACKAGES is None:
        pytest.skip("needs Node 22 and the trace engine; .ci/run installs them and says where they are")
    file, script = tmp_path / "trace.json", Path(PACKAGES) / "parse_trace.mjs"
    file.write_bytes(chrome_trace(await view_of_a_session()))
    script.write_text(PARSE, encoding="utf-8")
    parsed = await asyncio.to_thread(
        subprocess.run, ["node", str(script), str(file)], capture_output=True, text=True, check=True
    )
    assert json.loads(parsed.stdout) == 22
