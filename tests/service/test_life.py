"""How the service begins, how it can be found, and how it ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from mcp import MCPError

from tests.bare_client import call
from tests.processes import family, wait_until
from tests.services import OwnService

SLEEPER: list[dict[str, Any]] = [{"name": "long", "executable": "/bin/sleep", "arguments": ["612"]}]
WAITING: list[dict[str, Any]] = [{"name": "later", "executable": "/bin/echo", "after": ["long"]}]


async def start_tasks(own: OwnService) -> None:
    """One that runs and one that waits for it, in a session named work, left by its client."""
    async with own.bridge() as bridge:
        await call(bridge, "create_session", name="work", backends=["local"])
        await call(bridge, "submit_tasks", session="work", tasks=[*SLEEPER, *WAITING])
        while not family("sleep 612"):
            await call(bridge, "wait_tasks", session="work", timeout_s=0.1)
        while (await call(bridge, "wait_tasks", session="work", timeout_s=0.1))["counts"].get("RUNNING") != 1:
            pass


# --- it begins


@pytest.mark.anyio
async def test_a_ledger_that_cannot_be_read_reaches_the_client_and_its_user_in_words(own: OwnService) -> None:
    own.paths.make_folders()
    (own.paths.state / "ledger.sqlite").write_bytes(b"not a ledger at all " * 1000)
    with anyio.fail_after(600):
        with pytest.RaisesGroup(pytest.RaisesExc(MCPError, match="ledger.sqlite"), flatten_subgroups=True):
            async with own.client():
                raise AssertionError("it is served")
    started = own.run("service", "start")
    assert started.returncode == 1 and "ledger.sqlite" in started.stderr


def test_a_state_folder_that_cannot_be_made_is_told(own: OwnService) -> None:
    own.paths.state.write_text("a file")
    ran = own.run("service", "start")
    assert ran.returncode == 1 and "cannot be made" in ran.stderr


def test_settings_that_are_wrong_are_told_to_whoever_starts_it(own: OwnService, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("wait_cap: 5")
    ran = own.run("stdio", "--config", tmp_path / "wrong.yaml")
    assert ran.returncode == 1 and "did you mean 'wait_cap_s'?" in ran.stderr


def test_settings_that_differ_from_those_of_the_service_are_told_and_harm_nothing(
    shared: OwnService, tmp_path: Path
) -> None:
    (tmp_path / "other.yaml").write_text("wait_cap_s: 5")
    assert shared.run("service", "start").returncode == 0
    ran = shared.run("stdio", "--config", tmp_path / "other.yaml")
    assert ran.returncode == 0
    assert "took its settings when it started; these differ: wait_cap_s." in ran.stderr


def test_a_second_start_finds_the_first(shared: OwnService) -> None:
    assert shared.run("service", "start").returncode == 0
    first = shared.pid
    assert shared.run("service", "start").returncode == 0
    assert shared.run("service", "run").stderr == "Another service runs here.\n"
    assert shared.pid == first


# --- it is found


@pytest.mark.anyio
async def test_a_socket_that_was_removed_or_replaced_is_made_again_and_its_lock_too(own: OwnService) -> None:
    socket, lock = own.paths.socket, own.paths.lock

    async def found_again(replaced_by: str = "", *also_lost: Path) -> None:
        before = socket.stat()
        for file in (socket, *also_lost):
            file.unlink()
        if replaced_by:
            socket.write_text(replaced_by)
        await wait_until(lambda: socket.is_socket() and socket.stat().st_ino != before.st_ino)

    with anyio.fail_after(600):
        async with own.bridge() as bridge:
            await call(bridge, "create_session", name="kept", backends=["local"])
            pid = own.pid
            await found_again()
            await found_again("no socket")
            await found_again("", lock)
            assert [row["session"] for row in (await call(bridge, "list_sessions"))["sessions"]] == ["kept"]
        assert own.pid == pid and lock.exists()


async def ask(stream: ByteStream, message: dict[str, Any]) -> dict[str, Any]:
    await stream.send(json.dumps(message).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive()
    answer: dict[str, Any] = json.loads(line)
    return answer


@pytest.mark.anyio
async def test_two_hundred_clients_are_served_at_once_though_few_files_may_be_open(own: OwnService) -> None:
    await anyio.run_process(["sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh", *own.command("service", "start")])
    hello = {"rhapsody": "any", "as": "mcp"}
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    listing = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}
    calling = {
        "jsonrpc": "2.0",
        "id": 2,
        "method": "tools/call",
        "params": {"name": "list_sessions", "arguments": {}, "_meta": meta},
    }
    met, all_met, done = 0, anyio.Event(), anyio.Event()

    async def visit() -> None:
        nonlocal met
        async with await anyio.connect_unix(own.paths.socket) as stream:
            assert "pid" in await ask(stream, hello)
            assert (await ask(stream, listing))["result"]["tools"]
            met += 1
            if met == 200:
                all_met.set()
            await all_met.wait()
            assert (await ask(stream, calling))["result"]["structuredContent"]["sessions"] == []
            await done.wait()

    with anyio.fail_after(600):
        async with anyio.create_task_group() as group:
            for _ in range(200):
                group.start_soon(visit)
            await all_met.wait()
            assert (await anyio.to_thread.run_sync(own.status))["connections"] == 200
            done.set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("hello", "words"),
    [
        ({"as": "mcp", "offer": {"allow_source": True}}, "unknown setting of a client 'allow_source'"),
        ({"as": "mcp", "offer": {"toolsets": ["task"]}}, "did you mean 'tasks'?"),
        ({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, "use `rhapsody-mcp stdio`"),
    ],
)
async def test_what_a_client_may_not_ask_for_is_refused(hello: dict[str, Any], words: str, shared: OwnService) -> None:
    with anyio.fail_after(600):
        await anyio.to_thread.run_sync(shared.run, "service", "start")
        async with await anyio.connect_unix(shared.paths.socket) as stream:
            assert words in (await ask(stream, hello))["error"]


# --- it ends


@pytest.mark.anyio
async def test_it_ends_by_itself_when_nobody_has_used_it_for_long(own: OwnService, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("service_idle_s: 5")
    with anyio.fail_after(600):
        async with own.bridge("--config", tmp_path / "settings.yaml") as bridge:
            await call(bridge, "create_session", name="used", backends=["local"])
            await call(bridge, "close_session", session="used")
            pid = own.pid
        await wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert not own.paths.socket.exists()
    assert own.run("service", "status").returncode == 1


@pytest.mark.anyio
async def test_stop_refuses_while_tasks_have_not_ended_unless_it_is_forced(own: OwnService) -> None:
    with anyio.fail_after(600):
        await start_tasks(own)
        refused = await anyio.to_thread.run_sync(own.run, "service", "stop")
        assert refused.returncode == 1
        assert "Tasks have not ended in work (1 running, 0 queued, 1 waiting)" in refused.stderr
        shown = own.run("service", "status").stdout
        assert "work: 1 running, 0 queued, 1 waiting" in shown
        pid = own.pid
        assert own.run("service", "stop", "--force").returncode == 0
        await wait_until(lambda: not Path(f"/proc/{pid}").exists() and not family("sleep 612"))


@pytest.mark.anyio
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
async def test_sessions_are_there_again_after_its_end(way: signal.Signals, own: OwnService) -> None:
    with anyio.fail_after(600):
        await start_tasks(own)
        pid = own.pid
        os.kill(pid, way)
        await wait_until(lambda: not Path(f"/proc/{pid}").exists() and not family("sleep 612"))
        async with own.bridge() as bridge:
            waited = await call(bridge, "wait_tasks", session="work", tasks=["long"], timeout_s=50)
    assert [row["cause"] for row in waited["failures"]] == ["lost"]


@pytest.mark.anyio
async def test_who_comes_while_it_ends_gets_the_next_one(own: OwnService) -> None:
    with anyio.fail_after(600):
        await start_tasks(own)
        pid = own.pid
        os.kill(pid, signal.SIGTERM)
        async with own.bridge() as bridge:
            assert [row["session"] for row in (await call(bridge, "list_sessions"))["sessions"]] == ["work"]
        assert own.pid != pid


def test_what_does_not_run_is_stopped_already(own: OwnService) -> None:
    ran = own.run("service", "stop")
    assert (ran.returncode, ran.stdout) == (0, "No service runs here.\n")


@pytest.mark.anyio
async def test_a_session_that_nobody_has_used_for_long_is_forgotten_with_its_files(
    own: OwnService, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_text("keep_sessions_days: 0.0000001")
    with anyio.fail_after(600):
        async with own.bridge() as bridge:
            await call(bridge, "create_session", name="old", backends=["local"])
            await call(bridge, "submit_tasks", session="old", tasks=[{"name": "t", "executable": "/bin/echo"}])
            await call(bridge, "wait_tasks", session="old")
        assert own.run("service", "stop").returncode == 0
        assert list((own.paths.state / "sessions").iterdir())
        assert own.run("service", "start", "--config", tmp_path / "settings.yaml").returncode == 0
        await wait_until(lambda: not list((own.paths.state / "sessions").iterdir()))
        assert own.status()["sessions"] == []
