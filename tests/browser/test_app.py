"""The page as an MCP App, in the reference host of the ext-apps package and under the policy that hosts give pages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from playwright.async_api import FrameLocator, Page, expect

from tests.browser.sessions import call, local_session, served
from tests.browser.test_page import PRINTER, SWEEP

pytestmark = [pytest.mark.ci, pytest.mark.anyio]
HOST = Path(__file__).with_name("app_host.js")
PACKAGES = os.environ.get("RHAPSODY_NODE_PACKAGES")
"""A folder with ext-apps, the SDK's client and esbuild in its node_modules."""


@pytest.fixture(scope="module")
def host_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    if PACKAGES is None:
        pytest.skip("needs Node 22 and the ext-apps package; .ci/run installs them and says where they are")
    bundle = tmp_path_factory.mktemp("host") / "host.js"
    source = Path(PACKAGES) / HOST.name
    source.write_text(HOST.read_text(encoding="utf-8"), encoding="utf-8")
    esbuild = [f"{PACKAGES}/node_modules/.bin/esbuild", str(source), "--bundle", "--format=esm", f"--outfile={bundle}"]
    subprocess.run(esbuild, check=True, capture_output=True)
    return bundle.read_text(encoding="utf-8")


async def host(page: Page, address: str, script: str) -> FrameLocator:
    """Opens the host at the address of the server, which a browser takes for the same site; the frame of the page."""
    site = f"{address.removesuffix('/mcp')}/host"
    await page.route(
        site, lambda route: route.fulfill(body="<!doctype html><title>Chat</title>", content_type="text/html")
    )
    await page.goto(site)
    await page.add_script_tag(content=script, type="module")
    await page.wait_for_function("Boolean(window.show)")
    return page.frame_locator("iframe")


async def test_a_chat_shows_the_page_which_asks_for_its_data_itself(
    page: Page, host_script: str, pictures: Path
) -> None:
    with served() as (address, _):
        async with local_session(page, address, PRINTER, wait=False) as client:
            frame = await host(page, address, host_script)
            await page.evaluate("show('get_statistics', {session: 'session-1'}, 'dark')")
            await expect(frame.locator("#chips")).to_contain_text("1 RUNNING")
            await call(client, "submit_tasks", session="session-1", tasks=[SWEEP])
            await expect(frame.locator("#chips")).to_contain_text("36 DONE")
            await frame.locator("#failure-groups summary").click()
            await frame.locator("#failure-groups .list button").first.click()
            await expect(frame.locator("#detail-body")).to_contain_text("no convergence after 3 steps")
            await frame.locator("#detail-close").click()
            seen = await page.evaluate("seen")
            assert seen["mimeType"] == "text/html;profile=mcp-app" and seen["sizes"]
            assert {*seen["calls"]} == {"get_statistics", "dashboard"}
            back = "getComputedStyle(document.body).backgroundColor"
            assert await frame.locator("body").evaluate(back) == "rgb(20, 24, 31)"
            await page.evaluate("bridge.setHostContext({theme: 'light'})")
            await expect(frame.locator("html")).to_have_attribute("data-theme", "light")
            await page.screenshot(path=pictures / "app.png", full_page=True)


async def test_a_task_is_canceled_from_the_chat_once_the_person_said_so(page: Page, host_script: str) -> None:
    with served() as (address, _):
        async with local_session(page, address, PRINTER, wait=False) as client:
            frame = await host(page, address, host_script)
            await page.evaluate("show('wait_tasks', {session: 'session-1', timeout_s: 0.1}, 'light')")
            await frame.locator("#task-table").get_by_role("button", name="printer").click()
            await expect(frame.locator("#detail-body pre.live")).to_contain_text("line")
            await frame.get_by_role("button", name="Cancel printer").click()
            assert "cancel_tasks" not in await page.evaluate("seen.calls")
            await frame.get_by_role("button", name="Yes, cancel").click()
            await expect(frame.locator("#chips")).to_contain_text("1 CANCELED")
            result = await call(client, "get_result", session="session-1", task="printer")
            assert result["state"] == "CANCELED"


async def test_a_client_without_apps_is_shown_neither_the_page_nor_its_tool(page: Page, host_script: str) -> None:
    with served() as (address, _):
        async with local_session(page, address) as client:
            await host(page, address, host_script)
            lists = await page.evaluate("plainLists()")
            assert len(lists["tools"]) == 12 and not lists["withPage"] and "dashboard" not in lists["tools"]
            assert not [uri for uri in lists["resources"] if uri.startswith("ui://")]
            refused = await client.call_tool("dashboard", {"what": "sessions", "query": {}})
            assert refused.is_error
