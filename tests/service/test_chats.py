"""Chats come and go; the service and what runs in it stay."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client

from tests.agents import ERAS
from tests.bare_client import call
from tests.processes import family, wait_until
from tests.services import OwnService

pytestmark = pytest.mark.anyio
SLEEPER: list[dict[str, Any]] = [{"name": "long", "executable": "/bin/sleep", "arguments": ["600"]}]
RUNNING = {"RUNNING": 1}


async def counts(client: Client, session: str) -> dict[str, int]:
    reply = await client.call_tool("wait_tasks", {"session": session, "timeout_s": 0.1})
    assert reply.structured_content, reply
    return dict(reply.structured_content["counts"])


async def start_sleeper(client: Client, session: str) -> None:
    await client.call_tool("create_session", {"name": session, "backends": ["local"]})
    await client.call_tool("submit_tasks", {"session": session, "tasks": SLEEPER})
    while await counts(client, session) != RUNNING:
        pass


@pytest.mark.parametrize("era", ERAS)
async def test_a_task_of_a_closed_chat_goes_on_and_the_next_client_sees_it(era: str, shared: OwnService) -> None:
    with anyio.fail_after(600):
        async with shared.client(era) as first:
            await start_sleeper(first, f"left-{era}")
        async with shared.client(era) as second:
            assert await counts(second, f"left-{era}") == RUNNING
            await second.call_tool("close_session", {"session": f"left-{era}", "force": True})


async def test_clients_that_start_it_at_once_get_one_service(own: OwnService) -> None:
    pids: set[int] = set()

    async def look(number: int) -> None:
        async with own.bridge() as bridge:
            await call(bridge, "create_session", name=f"of-{number}", backends=["local"])
            ready[number].set()
            for one in ready:
                await one.wait()
            sessions = (await call(bridge, "list_sessions"))["sessions"]
            assert {row["session"] for row in sessions} == {f"of-{one}" for one in range(5)}

    ready = [anyio.Event() for _ in range(5)]
    with anyio.fail_after(600):
        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(look, number)
        pids.add(own.pid)
        await wait_until(lambda: set(family("service run", str(own.folder))) == pids)


@pytest.mark.parametrize("eras", [ERAS])
async def test_clients_of_both_eras_are_served_side_by_side(eras: list[str], shared: OwnService) -> None:
    with anyio.fail_after(600):
        async with shared.client(eras[0]) as one, shared.client(eras[1]) as other:
            await one.call_tool("create_session", {"name": "both", "backends": ["local"]})
            listed = await other.call_tool("list_sessions", {})
            assert listed.structured_content
            assert "both" in [row["session"] for row in listed.structured_content["sessions"]]
            await other.call_tool("close_session", {"session": "both", "force": True})


async def test_each_client_is_offered_what_it_asks_for(shared: OwnService) -> None:
    with anyio.fail_after(600):
        async with shared.client("auto", "--read-only") as reader, shared.client() as writer:
            assert "submit_tasks" not in {tool.name for tool in (await reader.list_tools()).tools}
            assert "submit_tasks" in {tool.name for tool in (await writer.list_tools()).tools}


async def test_tasks_start_in_the_folder_of_the_chat_that_opened_their_session(
    shared: OwnService, tmp_path: Path
) -> None:
    with anyio.fail_after(600):
        async with await anyio.open_process(shared.command("stdio"), cwd=tmp_path, stderr=None) as bridge:
            await call(bridge, "create_session", name="here", backends=["local"])
            await call(bridge, "submit_tasks", session="here", tasks=[{"name": "where", "executable": "/bin/pwd"}])
            await call(bridge, "wait_tasks", session="here")
            assert (await call(bridge, "get_result", session="here", task="where"))["result"].strip() == str(tmp_path)
            await call(bridge, "close_session", session="here")


async def test_the_end_of_stdin_ends_the_bridge_and_nothing_else(shared: OwnService) -> None:
    with anyio.fail_after(600):
        async with shared.bridge() as bridge:
            assert "sessions" in await call(bridge, "list_sessions")
            assert bridge.stdin
            await bridge.stdin.aclose()
            assert await bridge.wait() == 0
        assert shared.status()["running"]


async def test_a_bridge_whose_group_is_killed_leaves_the_service(own: OwnService) -> None:
    """As MCP clients do it where a server does not end by itself."""
    with anyio.fail_after(600):
        async with await anyio.open_process(own.command("stdio"), start_new_session=True) as bridge:
            await call(bridge, "create_session", name="kept", backends=["local"])
            os.killpg(bridge.pid, signal.SIGKILL)
            await bridge.wait()
        assert [row["session"] for row in own.status()["sessions"]] == ["kept"]


async def test_whoever_is_connected_hears_that_the_service_went_away(own: OwnService) -> None:
    with anyio.fail_after(600):
        async with own.bridge() as bridge:
            await call(bridge, "create_session", name="kept", backends=["local"])
            os.kill(own.pid, signal.SIGKILL)
            assert await bridge.wait() == 1
            assert bridge.stderr
            assert b"the service went away" in await bridge.stderr.receive()
        async with own.bridge() as bridge:
            assert [row["session"] for row in (await call(bridge, "list_sessions"))["sessions"]] == ["kept"]
