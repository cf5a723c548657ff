"""The page over HTTP, in a real browser, before a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from playwright.async_api import Page, expect

from tests.backends.openai_stand_in import StandIn, serve
from tests.browser.sessions import SIMULATE, call, local_session, proxy, served, shows

pytestmark = [pytest.mark.ci, pytest.mark.anyio]
SWEEP: dict[str, Any] = {
    "name": "sweep",
    "source": SIMULATE,
    "for_each": list(range(40)),
    "args": [{"item": True}],
}
PRINTER: dict[str, Any] = {
    "name": "printer",
    "executable": "/bin/sh",
    "arguments": ["-c", "for i in $(seq 600); do echo line $i; sleep 0.2; done"],
}


async def test_a_failure_is_found_in_two_clicks(page: Page, pictures: Path) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.goto(dashboard)
            await shows(page, "#chips", "36 DONE")
            await shows(page, "#failures", "no convergence after 3 steps")
            await page.click("#failure-groups summary")
            await page.get_by_role("button", name="sweep[13]", exact=True).first.click()
            await shows(page, "#detail", "ValueError: no convergence after 13 steps")
            await shows(page, "#detail", 'raise ValueError(f"no convergence after {number} steps")')
            await shows(page, "#detail", "step 13")
            await page.screenshot(path=pictures / "failure.png")


async def test_what_runs_is_shown_live(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, PRINTER, wait=False) as client:
            await page.goto(f"{dashboard}#session=session-1")
            await shows(page, "#chips", "1 RUNNING")
            await page.locator("#task-table").get_by_role("button", name="printer").click()
            await shows(page, "#detail pre.live", "line 3")
            await shows(page, "#detail pre.live", "line 9")
            await page.click("#detail-close")
            await call(client, "submit_tasks", session="session-1", tasks=[SWEEP])
            await shows(page, "#chips", "36 DONE")
            await shows(page, "#legend", "sweep")


async def test_canceling_asks_before(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, PRINTER, wait=False) as client:
            await page.goto(dashboard)
            await shows(page, "#chips", "1 RUNNING")
            await page.locator("#task-table").get_by_role("button", name="printer").click()
            await page.get_by_role("button", name="Cancel printer").click()
            await page.get_by_role("button", name="No", exact=True).click()
            row = await call(client, "get_result", session="session-1", task="printer")
            assert row["state"] == "RUNNING"
            await page.get_by_role("button", name="Cancel printer").click()
            await page.get_by_role("button", name="Yes, cancel").click()
            await shows(page, "#chips", "1 CANCELED")
            row = await call(client, "get_result", session="session-1", task="printer")
            assert row["state"] == "CANCELED"


async def test_the_stream_is_zoomed_moved_and_opened_by_keyboard_and_mouse(page: Page, pictures: Path) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.goto(dashboard)
            await shows(page, "#chips", "36 DONE")
            before = await page.evaluate("page.stream.view()")
            await page.focus("#stream")
            await page.keyboard.press("+")
            zoomed = await page.evaluate("page.stream.view()")
            assert zoomed[1] - zoomed[0] < before[1] - before[0]
            await page.keyboard.press("ArrowLeft")
            moved = await page.evaluate("page.stream.view()")
            assert moved[0] < zoomed[0]
            await page.keyboard.press("Home")
            assert await page.evaluate("page.stream.view()") == before
            place = await page.evaluate(
                """() => {
                    const {spans, stream} = page;
                    const row = Array.from(spans.lane.subarray(0, spans.rows)).findIndex((lane) => lane !== 0xffff);
                    const {width, laneHeight, gutter} = stream.size();
                    const [from, to] = stream.view();
                    const middle = spans.ended[row] - spans.execution[row] / 2;
                    return [gutter + (middle - from) / (to - from) * (width - gutter),
                            (stream.lanes.indexOf(spans.lane[row]) + 0.5) * laneHeight];
                }"""
            )
            box = await page.locator("#stream").bounding_box()
            assert box is not None
            await page.mouse.move(box["x"] + place[0], box["y"] + place[1])
            await shows(page, "#tip", "sweep")
            await page.mouse.click(box["x"] + place[0], box["y"] + place[1])
            await shows(page, "#detail-title", "sweep[")
            await page.screenshot(path=pictures / "stream.png")


async def test_the_table_has_all_in_words_and_can_be_filtered(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.goto(dashboard)
            await shows(page, "#task-note", "1 to 40 of 40")
            await page.get_by_role("button", name="4 FAILED").click()
            await shows(page, "#task-note", "1 to 4 of 4")
            await page.fill("#filter", "[23]")
            await shows(page, "#task-note", "1 to 1 of 1")
            await shows(page, "#task-table", "no convergence after 23 steps")


async def test_it_is_dark_where_the_system_is_and_light_on_request(page: Page, pictures: Path) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.emulate_media(color_scheme="dark")
            await page.goto(dashboard)
            await shows(page, "#chips", "36 DONE")
            back = "getComputedStyle(document.body).backgroundColor"
            assert await page.evaluate(back) == "rgb(20, 24, 31)"
            await page.screenshot(path=pictures / "dark.png", full_page=True)
            await page.click("#theme")
            assert await page.evaluate(back) == "rgb(255, 255, 255)"


async def test_it_fits_the_width_of_a_chat(page: Page, pictures: Path) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.set_viewport_size({"width": 380, "height": 800})
            await page.goto(dashboard)
            await shows(page, "#chips", "36 DONE")
            await page.screenshot(path=pictures / "narrow.png", full_page=True)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 380


HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">'


async def test_no_text_of_a_task_becomes_markup(page: Page) -> None:
    source = f"def f():\n    print({HOSTILE!r})\n    raise ValueError({HOSTILE!r})"
    ok = f"def g():\n    return {{'answer': {HOSTILE!r}}}"
    with served() as (address, dashboard):
        tasks = [{"name": "fails", "source": source}, {"name": "answer", "source": ok}]
        async with local_session(page, address, *tasks):
            await page.goto(dashboard)
            await shows(page, "#failures", HOSTILE)
            await page.click("#failure-groups summary")
            await page.locator("#failure-groups .list button").click()
            await shows(page, "#detail-body", HOSTILE)
            await page.click("#detail-close")
            await page.locator("#task-table").get_by_role("button", name="answer").click()
            await shows(page, "#detail-body", "window.hacked")
            assert await page.evaluate("[window.hacked, document.images.length, document.scripts.length]") == [
                None,
                0,
                1,
            ]


async def test_no_text_of_a_model_becomes_markup(page: Page) -> None:
    async with serve(StandIn()) as model:
        model.answer = lambda prompt: f"{HOSTILE} {prompt}"
        with served() as (address, dashboard):
            async with local_session(page, address) as client:
                options = {"backends": ["endpoint"], "endpoint_url": model.url, "endpoint_model": "tiny"}
                await call(client, "create_session", name="chat", **options)
                await call(client, "submit_tasks", session="chat", tasks=[{"name": "ask", "prompt": HOSTILE}])
                await call(client, "wait_tasks", session="chat")
                await page.goto(f"{dashboard}#session=chat")
                await page.locator("#task-table").get_by_role("button", name="ask").click()
                await shows(page, "#detail-body", "onerror=")
                elements = await page.evaluate("[window.hacked, document.images.length, document.scripts.length]")
                assert elements == [None, 0, 1]


@pytest.mark.parametrize("strips", [True, False])
async def test_it_works_behind_a_prefix_of_a_proxy(page: Page, strips: bool) -> None:
    with served() as (address, _):
        async with (
            local_session(page, address, SWEEP),
            proxy(address, "/user/jane/proxy/8765", strips=strips) as outside,
        ):
            await page.goto(f"{outside}/dashboard")
            assert page.url == f"{outside}/dashboard/"
            await shows(page, "#chips", "36 DONE")
            await expect(page.locator("#status")).to_have_text("live")


async def test_a_token_is_asked_for_and_what_it_may_is_held_to(page: Page, tmp_path: Path) -> None:
    token = "a-token-of-mine-0123456789"
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    page.expected = "401"  # type: ignore[attr-defined]
    with served("--token-file", str(tmp_path / "token")) as (_, dashboard):
        await page.goto(dashboard)
        await shows(page, "#problem", "a bearer token is needed")
        await page.fill("#problem input", "a-wrong-token-0123456789")
        await page.click("#problem button")
        await shows(page, "#problem", "the token is not known here")
        await page.fill("#problem input", token)
        await page.click("#problem button")
        await shows(page, "#status", "no session is open")
        await page.goto(f"{dashboard}#token={token}")
        await page.reload()
        await shows(page, "#status", "no session is open")
        assert token not in page.url
        await page.goto("about:blank")


async def test_another_host_name_is_refused(page: Page) -> None:
    with served() as (_, dashboard):
        response = await page.request.get(dashboard, headers={"Host": "attacker.example"})
        assert response.status == 421
        response = await page.request.get(f"{dashboard}sessions", headers={"Host": "attacker.example"})
        assert response.status == 421
        response = await page.request.post(
            f"{dashboard}cancel?session=x", headers={"Origin": "http://attacker.example"}
        )
        assert response.status == 403
        response = await page.request.get(f"{dashboard}sessions")
        assert await response.json() == {"sessions": [], "may_cancel": True}


async def test_pictures_report_and_trace_are_saved(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP):
            await page.goto(dashboard)
            await shows(page, "#chips", "36 DONE")
            beginnings = {
                "SVG": b"<svg",
                "Trace": b'{"traceEvents"',
                "Report": b"<!doctype html>",
                "Save as PNG": b"\x89PNG",
            }
            for words, beginning in beginnings.items():
                async with page.expect_download() as downloading:
                    await page.get_by_role("button", name=words, exact=True).click()
                download = await downloading.value
                assert re.match(r"session-1\.(svg|trace\.json|html|png)", download.suggested_filename)
                assert (await anyio.Path(await download.path()).read_bytes()).startswith(beginning)


async def test_the_end_of_a_session_is_said_and_no_other_is_shown_in_its_place(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, SWEEP) as client:
            await call(client, "create_session", name="other", backends=["local"])
            await page.goto(f"{dashboard}#session=session-1")
            await shows(page, "#chips", "36 DONE")
            await call(client, "close_session", session="session-1", force=True)
            await expect(page.locator("#status")).to_have_text("closed")
            await shows(page, "#chips", "36 DONE")
            page.expected = "404"  # type: ignore[attr-defined]
            await page.goto("about:blank")
            await page.goto(f"{dashboard}#session=nowhere")
            await shows(page, "#problem", "nowhere")
            await expect(page.locator("#status")).to_have_text("not open")
            assert await page.locator("#chips").text_content() == ""


async def test_output_stays_where_a_reader_scrolled_to(page: Page) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address, PRINTER, wait=False):
            await page.goto(dashboard)
            await page.locator("#task-table").get_by_role("button", name="printer").click()
            await shows(page, "#detail pre.live", "line 40")
            output = page.locator("#detail pre.live")
            assert await output.evaluate("one => one.scrollTop + one.clientHeight >= one.scrollHeight - 4")
            await output.evaluate("one => (one.scrollTop = 30)")
            await shows(page, "#detail pre.live", "line 50")
            assert await output.evaluate("one => one.scrollTop") == 30
