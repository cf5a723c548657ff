"""The page as an MCP App: what a client that shows pages is given, and what every other client is not."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from mcp.client.extension import advertise
from mcp.server.apps import APP_MIME_TYPE, EXTENSION_ID
from mcp.types import TextResourceContents

from rhapsody_mcp.protocol.apps import PAGE_URI
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, Agent, Refused, open_agent, perform
from tests.slurm_stand_in import SlurmStandIn

pytestmark = pytest.mark.anyio
SHOWS_PAGES = [advertise(EXTENSION_ID, {"mimeTypes": [APP_MIME_TYPE]})]
OTHERS: list[dict[str, Any]] = [
    {},
    {"extensions": [advertise(EXTENSION_ID, {"mimeTypes": ["text/html"]})]},
    {"extensions": [advertise(EXTENSION_ID)]},
]


async def ask(agent: Agent, what: str, **query: str) -> dict[str, Any]:
    return await agent.call("dashboard", what=what, query=query)


@pytest.mark.parametrize("era", ERAS)
async def test_a_client_that_shows_pages_finds_the_page_at_two_tools(era: str) -> None:
    async with open_agent(era, extensions=SHOWS_PAGES) as agent:
        tools = {tool.name: tool for tool in (await agent.client.list_tools()).tools}
        with_page = {
            name for name, tool in tools.items() if (tool.meta or {}).get("ui", {}).get("resourceUri") == PAGE_URI
        }
        assert with_page == {"wait_tasks", "get_statistics", "dashboard"}
        assert (tools["dashboard"].meta or {})["ui"]["visibility"] == ["app"]
        (page,) = (await agent.client.read_resource(PAGE_URI)).contents
        assert isinstance(page, TextResourceContents)
        assert page.mime_type == APP_MIME_TYPE and page.text.startswith("<!doctype html>")


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("options", OTHERS, ids=["none", "other type", "no types"])
async def test_for_any_other_client_nothing_changes(era: str, options: dict[str, Any]) -> None:
    async with open_agent(era, **options) as agent:
        tools = (await agent.client.list_tools()).tools
        assert len(tools) == 12 and not [tool for tool in tools if "ui" in (tool.meta or {})]
        resources = (await agent.client.list_resources()).resources
        assert PAGE_URI not in [str(resource.uri) for resource in resources]
        text = await agent.refusal("dashboard", what="sessions", query={})
        assert "dashboard" in text and not re.search(r"(valid|Valid)[^.]*dashboard", text)


@pytest.mark.parametrize("era", ERAS)
async def test_the_page_gets_frames_tasks_and_details(era: str) -> None:
    async with open_agent(era, extensions=SHOWS_PAGES) as agent:
        session = await agent.session()
        source = "def f(n):\n    return n * 2"
        tasks = [{"name": f"double-{number}", "source": source, "args": [number]} for number in range(3)]
        await agent.call("submit_tasks", session=session, tasks=tasks)
        await agent.call("wait_tasks", session=session)
        assert (await ask(agent, "sessions"))["sessions"] == [{"session": session, "counts": {"DONE": 3}}]
        frame = await ask(agent, "frame", session=session, cursor="", version="-1")
        assert frame["block"]["rows"] == 3 and frame["head"]["counts"] == {"DONE": 3}
        found = await ask(agent, "tasks", session=session, name="double-2", states="DONE")
        assert [task["name"] for task in found["tasks"]] == ["double-2"]
        task = await ask(agent, "task", session=session, uid=found["tasks"][0]["uid"])
        assert (task["state"], task["result"]) == ("DONE", "4")
        first = await ask(agent, "task", session=session, row="0")
        assert first["name"] == "double-0"
        rows = await ask(agent, "rows", session=session, first="1", last="99")
        assert (rows["first"], rows["rows"]) == (1, 2)


@pytest.mark.parametrize(
    ("what", "query", "said"),
    [
        ("weather", {}, "Valid: sessions, task, tasks, rows"),
        ("frame", {"session": "session-9"}, "session-1"),
        ("task", {"session": "session-1", "uid": "nope"}, "nope"),
        ("task", {"session": "session-1", "row": "5"}, "5"),
        ("task", {"session": "session-1"}, "uid is missing"),
        ("tasks", {"session": "session-1", "offset": "-1"}, "whole number"),
        ("rows", {"session": "session-1", "first": "x", "last": "1"}, "whole number"),
    ],
)
async def test_a_wrong_question_is_answered_in_words(what: str, query: dict[str, str], said: str) -> None:
    async with open_agent(extensions=SHOWS_PAGES) as agent:
        await agent.session()
        with pytest.raises(Refused, match=re.escape(said)):
            await ask(agent, what, **query)


async def test_the_refresh_of_a_page_is_no_entry_of_the_audit_log_and_changes_no_statistics() -> None:
    async with open_agent(extensions=SHOWS_PAGES) as agent:
        session = await agent.session()
        before = await agent.call("get_statistics", session=session)
        await ask(agent, "frame", session=session)
        assert await agent.call("get_statistics", session=session) == before


async def test_the_allocation_of_a_session_is_shown_with_its_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlurmStandIn(tmp_path, monkeypatch)
    ends = time.time() + 605
    asked = {"nodes": 2, "minutes": 30}
    facts = {**asked, "job": "12", "state": "RUNNING", "on": ["n1", "n2"], "node_s": 1800.0, "ends_at": ends}
    backend = ScriptedBackend(perform)
    monkeypatch.setattr(backend, "describe", lambda: {"backend": backend.name, "allocation": facts})
    async with open_agent(backend=backend, extensions=SHOWS_PAGES) as agent:
        await agent.call("create_session", nodes=2, minutes=30)
        frame = await ask(agent, "frame", session="session-1")
        assert frame["head"]["allocation"] == "job 12 RUNNING on n1, n2, 10 min left; 0.5 node-hours used"
