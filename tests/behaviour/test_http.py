"""The server over HTTP: a process that many clients share."""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import socket
import stat
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.cli import main
from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.serving.http.listeners import listen_on_host, listen_on_socket
from rhapsody_mcp.settings import Settings
from tests.agents import ERAS, open_agent
from tests.processes import FAMILY, family, wait_until
from tests.services import CLIENT, PROGRAM, OwnService, own_service

SLEEPER: list[dict[str, Any]] = [{"name": "long", "executable": "/bin/sleep", "arguments": ["600"]}]


@pytest.fixture(scope="module")
def service() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@contextmanager
def serving(*arguments: str, service: OwnService | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process, and what it says first; it is asked to end if it has not ended. Without a service it
    holds the sessions itself."""
    command = service.command("http", *arguments) if service else [*PROGRAM, "http", "--in-process", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server, server.stdout.readline().strip().removeprefix("Listening on ")
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0
        finally:
            server.kill()


@asynccontextmanager
async def connected(address: str, era: str, path: Path | None = None) -> AsyncIterator[Client]:
    transport = httpx2.AsyncHTTPTransport(uds=str(path)) if path else None
    loop = asyncio.get_running_loop()
    raised = loop.get_exception_handler() or asyncio.AbstractEventLoop.default_exception_handler

    def pass_over(loop: asyncio.AbstractEventLoop, told: dict[str, Any]) -> None:
        """anyio's client of a Unix socket tells a read that was canceled meanwhile that there is something to read."""
        if not isinstance(told.get("exception"), asyncio.InvalidStateError):
            raised(loop, told)

    loop.set_exception_handler(pass_over)
    async with (
        httpx2.AsyncClient(transport=transport, timeout=60) as http,
        Client(streamable_http_client(address, http_client=http), mode=cast(Any, era), client_info=CLIENT) as client,
    ):
        yield client


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return cast(dict[str, Any], result.structured_content)


def post(address: str, **headers: str) -> httpx2.Response:
    """A list of tools, asked for in the revision that needs no handshake."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    needed = {
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": "2026-07-28",
        "Mcp-Method": "tools/list",
    }
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}
    return httpx2.post(address, json=body, headers={**needed, **headers}, timeout=60)


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("where", ["port", "socket"])
async def test_a_client_runs_a_task_and_hears_of_its_progress(
    where: str, era: str, tmp_path: Path, service: OwnService
) -> None:
    session = f"{where}-{era}"
    path = tmp_path / "server.sock" if where == "socket" else None
    heard: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(progress)

    place = ["--socket", str(path)] if path else ["--port", "0"]
    with anyio.fail_after(600), serving(*place, service=service) as (_, told):
        address = "http://localhost/mcp" if path else told
        async with connected(address, era, path) as client:
            await call(client, "create_session", name=session, backends=["local"])
            task = {"name": "echo", "executable": "/bin/sh", "arguments": ["-c", "sleep 1; echo hello"]}
            await call(client, "submit_tasks", session=session, tasks=[task])
            waited = await client.call_tool("wait_tasks", {"session": session}, progress_callback=hear)
            await call(client, "close_session", session=session)
            assert waited.structured_content and waited.structured_content["counts"] == {"DONE": 1}
    assert heard
    assert path is None or not path.exists()


@pytest.mark.anyio
async def test_clients_of_both_eras_share_sessions_which_outlive_them(service: OwnService) -> None:
    with anyio.fail_after(600), serving("--port", "0", service=service) as (_, address):
        async with connected(address, "auto") as later:
            async with connected(address, "legacy") as first:
                await call(first, "create_session", name="shared", backends=["local"])
                await call(later, "submit_tasks", session="shared", tasks=SLEEPER)
                assert (await call(first, "list_tasks", session="shared"))["total"] == 1
            assert [row["session"] for row in (await call(later, "list_sessions"))["sessions"]] == ["shared"]
            await call(later, "close_session", session="shared", force=True)


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_answers_those_who_wait_and_leaves_nothing(
    way: signal.Signals, era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)

    async def end(progress: float, total: float | None, message: str | None) -> None:
        if family("sleep 600"):
            server.send_signal(way)

    with anyio.fail_after(600), serving("--port", "0") as (server, address):
        async with connected(address, era) as client:
            await call(client, "create_session", backends=["local"])
            await call(client, "submit_tasks", session="session-1", tasks=SLEEPER)
            waited = await client.call_tool("wait_tasks", {"session": "session-1"}, progress_callback=end)
            assert waited.structured_content and waited.structured_content["counts"] == {"CANCELED": 1}
        assert await anyio.to_thread.run_sync(server.wait) == 0
        await wait_until(lambda: not family(), within_s=120)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a server that demands a token although it is local, and the token."""
    file = tmp_path_factory.mktemp("http") / "token"
    token = secrets.token_urlsafe(32)
    file.touch(0o600)
    file.write_text(f"{token}\n")
    with serving("--port", "0", "--token-file", str(file)) as (_, address):
        yield address, token


def test_who_has_the_token_is_served(guarded: tuple[str, str]) -> None:
    address, token = guarded
    answer = post(address, Authorization=f"Bearer {token}")
    assert answer.status_code == 200
    assert answer.json()["result"]["tools"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic {token}"}])
def test_who_has_no_token_or_another_is_refused(headers: dict[str, str], guarded: tuple[str, str]) -> None:
    address, token = guarded
    answer = post(address, **{name: value.format(token=token) for name, value in headers.items()})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert token not in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:3000"}, 200),
    ],
)
def test_a_page_from_elsewhere_is_refused(headers: dict[str, str], status: int, guarded: tuple[str, str]) -> None:
    address, token = guarded
    assert post(address, Authorization=f"Bearer {token}", **headers).status_code == status


def test_where_other_machines_connect_a_first_token_is_made_and_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with serving("--host", "0.0.0.0", "--allowed-host", "node1", "--port", "0") as (server, address):
        assert server.stdout
        token = server.stdout.readline().strip().removeprefix("Bearer token, shown only now: ")
        here = address.replace("0.0.0.0", "127.0.0.1")
        (file,) = tmp_path.glob("rhapsody-mcp/*/tokens.json")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert token not in file.read_text()
        assert post(here, Host="node1").status_code == 401
        assert post(here, Host="node1", Authorization=f"Bearer {token}").status_code == 200
        assert post(here, Authorization=f"Bearer {token}").status_code == 421
        server.send_signal(signal.SIGTERM)
        assert token not in server.stdout.read()
    with serving("--host", "0.0.0.0", "--allowed-host", "node1", "--port", "0") as (server, address):
        assert server.stdout and "rhapsody-mcp token create NAME" in server.stdout.readline()
        here = address.replace("0.0.0.0", "127.0.0.1")
        assert post(here, Host="node1", Authorization=f"Bearer {token}").status_code == 200


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a server that did not start."""
    assert main(["http", "--in-process", "--port", "0", *arguments]) == 1
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_an_address_that_stands_for_all_needs_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Say under which names clients call it: --allowed-host" in refused(capsys, "--host", "0.0.0.0")


def test_a_host_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be listened on" in refused(capsys, "--host", "192.0.2.1")
    assert "Give a name or an address of this machine" in refused(capsys, "--host", "no.such.host.invalid")


def test_a_port_that_is_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with listen_on_host("127.0.0.1", 0) as other:
        assert main(["http", "--in-process", "--port", str(other.socket.getsockname()[1])]) == 1
    assert "Another program listens there: choose another --port" in capsys.readouterr().err


def test_a_reply_in_two_pieces_does_not_wait_for_an_acknowledgement() -> None:
    with listen_on_host("127.0.0.1", 0) as here, socket.create_connection(here.socket.getsockname()):
        accepted, _ = here.socket.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("x" * 32, 0o640, "is open to others"),
        ("short", 0o600, "holds no token"),
        ("two words of many letters", 0o600, "holds no token"),
    ],
)
def test_a_token_file_that_protects_nothing_is_refused(
    text: str, mode: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    said = refused(capsys, "--token-file", str(file))
    assert reason in said and text not in said


def test_a_token_file_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--token-file", str(tmp_path / "token"))
    assert "cannot be read" in said and "`rhapsody-mcp token create NAME`" in said


def test_a_socket_is_for_its_owner_and_replaces_one_that_a_killed_server_left(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listen_on_socket(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_socket_of_a_living_server_is_not_taken_from_it(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with listen_on_socket(path):
        with pytest.raises(InvalidSettings, match="a server listens on the socket"), listen_on_socket(path):
            raise AssertionError("two servers listen")
        assert path.is_socket()


def test_a_socket_where_others_could_put_their_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(InvalidSettings, match="others can replace"), listen_on_socket(tmp_path / "shared" / "sock"):
        raise AssertionError("it listens")


@pytest.mark.parametrize("path", ["missing/sock", "file", "x" * 200])
def test_a_socket_that_cannot_be_made_is_refused_in_words(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InvalidSettings, match=r"cannot be made: .+ Choose another"), listen_on_socket(tmp_path / path):
        raise AssertionError("it listens")
    assert (tmp_path / "file").read_text() == "kept"


# --- what is offered


def test_a_server_that_only_reads_says_what_it_does_not_offer() -> None:
    with serving("--port", "0", "--read-only", "--toolsets", "sessions,tasks") as (_, address):
        names = {tool["name"] for tool in post(address).json()["result"]["tools"]}
    assert "list_sessions" in names
    assert not names & {"create_session", "submit_tasks", "describe_system"}


@pytest.mark.anyio
@pytest.mark.parametrize("read_only", [False, True])
async def test_the_instructions_name_what_is_not_offered(read_only: bool) -> None:
    cards = [card for card in read_cards() if card.toolset == "sessions"]
    offered = {card.name for card in cards if card.annotations.read_only or not read_only}
    async with open_agent(settings=Settings(toolsets=("sessions",), read_only=read_only)) as agent:
        assert {tool.name for tool in (await agent.client.list_tools()).tools} == offered
        last = (agent.client.instructions or "").splitlines()[-1]
        told, _, withheld = last.partition("It does not offer")
        assert set(re.findall(r"`(\w+)`", told)) == offered
        assert set(re.findall(r"`(\w+)`", withheld)) == {card.name for card in read_cards()} - offered
        assert "unknown tool 'submit_tasks'" in await agent.refusal("submit_tasks")


def test_an_unknown_toolset_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown toolset 'task' (did you mean 'tasks'?)" in refused(capsys, "--toolsets", "sessions,task")
    assert main(["stdio", "--in-process", "--toolsets", "task"]) == 1


def test_what_is_offered_can_be_settled_in_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("read_only: true\ntoolsets: [sessions]\n")
    with serving("--port", "0", "--config", str(file)) as (_, address):
        names = {tool["name"] for tool in post(address).json()["result"]["tools"]}
    assert "list_sessions" in names and not names & {"create_session", "submit_tasks", "list_tasks"}
