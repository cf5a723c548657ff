"""The server as clients start it: a process that speaks on stdin and stdout."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from typing import Any, cast

import anyio
import pytest
from mcp import Client, StdioServerParameters

from rhapsody_mcp.cards import read_cards
from tests.agents import ERAS, text_of
from tests.bare_client import COMMAND, busy_server, call
from tests.processes import FAMILY, family, wait_until
from tests.services import CLIENT, OwnService, own_service

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def service() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@pytest.fixture(params=["service", "in process"])
def command(request: pytest.FixtureRequest, service: OwnService) -> list[str]:
    """What a client starts."""
    return service.command("stdio") if request.param == "service" else COMMAND


@pytest.mark.parametrize("era", ERAS)
async def test_a_client_runs_a_pipeline_in_both_eras_of_the_protocol(era: str, command: list[str]) -> None:
    session = f"of-{era}"
    server = StdioServerParameters(command=command[0], args=command[1:])
    source = "def total(text):\n    print('adding')\n    return sum(map(int, text.split()))"
    with anyio.fail_after(600):
        async with Client(server, mode=cast(Any, era), client_info=CLIENT) as client:
            assert {tool.name for tool in (await client.list_tools()).tools} == {card.name for card in read_cards()}
            await client.call_tool("create_session", {"name": session, "backends": ["local"]})
            tasks: list[dict[str, Any]] = [
                {"name": "total", "source": source, "args": [{"ref": "numbers"}]},
                {"name": "numbers", "executable": "/bin/echo", "arguments": [1, 2, 39]},
            ]
            await client.call_tool("submit_tasks", {"session": session, "tasks": tasks})
            waited = await client.call_tool("wait_tasks", {"session": session})
            assert waited.structured_content and waited.structured_content["ended"]
            result = await client.call_tool("get_result", {"session": session, "task": "total"})
            await client.call_tool("close_session", {"session": session})
    assert result.structured_content
    assert (result.structured_content["result"], result.structured_content["stdout"]) == (42, "adding\n")
    assert "untrusted output" in text_of(result)


@pytest.mark.parametrize("way", ["end of stdin", signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_whatever_ends_the_server_ends_all_that_it_started(
    way: str | signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)
    with anyio.fail_after(600):
        async with busy_server("local") as server:
            await wait_until(lambda: len(family("sleep 600")) >= 3)  # a task runs a moment before its program does
            assert server.stdin
            if isinstance(way, signal.Signals):
                server.send_signal(way)
            else:
                await server.stdin.aclose()
            code = await server.wait()
            await wait_until(lambda: not family(), within_s=120)
    assert code == {"end of stdin": 0, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[way]


async def test_an_empty_line_is_no_message(command: list[str]) -> None:
    with anyio.fail_after(600):
        async with await anyio.open_process(command, stderr=None) as server:
            assert server.stdin
            await server.stdin.send(b"\n \n")
            assert (await call(server, "list_sessions")) == {"sessions": []}
