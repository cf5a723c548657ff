"""What is written down of who called what."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client
from mcp.shared.exceptions import MCPError

from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.protocol.audit_log import AuditFile
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.call_context import current_caller
from rhapsody_mcp.runtime.redaction import redacted, summary
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, perform
from tests.behaviour.test_tasks_extension import SESSION, Polls, Waits, created
from tests.security.guarded import call_body, guarded
from tests.services import own_service

pytestmark = pytest.mark.anyio


class Log:
    def __init__(self, file: Path, max_bytes: int = 10_000_000) -> None:
        self.path = file
        self.file = AuditFile(file, max_bytes, 2)

    def entries(self, **wanted: Any) -> list[dict[str, Any]]:
        """Those that have these values; nothing more is written then."""
        self.file.close()
        found = [cast(dict[str, Any], json.loads(line)) for line in self.path.read_text("ascii").splitlines()]
        return [entry for entry in found if wanted.items() <= entry.items()]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "state" / "audit.jsonl")


@asynccontextmanager
async def recorded(
    log: Log, era: str = "auto", backend: ScriptedBackend | None = None, **options: Any
) -> AsyncIterator[Client]:
    """A client before a server that writes into the log."""
    scripted = backend or ScriptedBackend(perform)
    async with SessionRegistry(lambda _: [scripted]) as sessions, TasksExtension() as tasks:
        server = build_server(Settings(), sessions, [tasks], Audit(log.file))
        async with Client(server, mode=cast(Any, era), **options) as client:
            yield client


# --- calls


@pytest.mark.parametrize("era", ERAS)
async def test_a_call_is_an_entry_that_says_who_what_when_and_what_came_of_it(era: str, log: Log) -> None:
    async with recorded(log, era) as client:
        await client.call_tool("create_session", {})
        await client.call_tool("submit_tasks", {**SESSION, "tasks": [{"name": "a", "prompt": "x"}]})
    (entry,) = log.entries(tool="submit_tasks")
    assert (entry["method"], entry["session"], entry["result"]) == ("tools/call", "session-1", "ok")
    assert (entry["submitted"], entry["first"], entry["last"]) == (1, "task.000001", "task.000001")
    assert entry["client"].startswith("mcp ") and entry["transport"] == "stdio"
    assert entry["at"].endswith("+00:00") and entry["ms"] >= 0
    assert log.entries(method="server/discover" if era == "auto" else "initialize")


async def test_what_is_refused_or_goes_wrong_is_an_entry_with_the_reason(log: Log) -> None:
    async with recorded(log) as client:
        await client.call_tool("wait_tasks", {"session": "nowhere"})
        with pytest.raises(MCPError):
            await client.read_resource("rhapsody://sessions/nowhere")
    (refused,) = log.entries(tool="wait_tasks")
    assert refused["result"] == "refused" and "unknown session 'nowhere'" in refused["why"]
    (failed,) = log.entries(method="resources/read")
    assert failed["result"] == "error" and failed["params"] == {"uri": "rhapsody://sessions/nowhere"}


async def test_a_call_that_its_client_gives_up_is_an_entry(log: Log) -> None:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with recorded(log, backend=backend) as client:
        await client.call_tool("create_session", {})
        await client.call_tool("submit_tasks", {**SESSION, "tasks": [{"name": "a", "prompt": "x"}]})
        with anyio.move_on_after(0.05):
            await client.call_tool("wait_tasks", SESSION)
        await client.call_tool("list_tasks", SESSION)
    (entry,) = log.entries(tool="wait_tasks")
    assert entry["result"] == "canceled"


async def test_a_call_that_is_answered_with_a_handle_has_an_entry_when_it_ends_too(log: Log) -> None:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with recorded(log, backend=backend, extensions=[Polls()]) as client:
        await client.session.call_tool("create_session", {}, allow_claimed=True)
        tasks = [{"name": "a", "prompt": "x"}]
        await client.session.call_tool("submit_tasks", {**SESSION, "tasks": tasks}, allow_claimed=True)
        handle = await created(client, "wait_tasks", **SESSION)
        backend.may_finish.set()
        await Waits(client.session).settled(handle.task_id)
    deferred, ended = log.entries(tool="wait_tasks")
    assert (deferred["result"], ended["result"], ended["deferred"]) == ("deferred", "ok", True)
    assert deferred["handle"] == ended["handle"]
    assert handle.task_id.startswith(deferred["handle"]) and handle.task_id not in log.path.read_text()


async def test_who_calls_is_known_for_as_long_as_the_call_lasts() -> None:
    heard: list[str] = []

    def hear(spec: Any, values: list[Any]) -> Any:
        raise NotImplementedError

    async with SessionRegistry(lambda _: [ScriptedBackend(hear)]) as sessions:
        sessions.watch(lambda opened, task: heard.append(current_caller.get()))
        async with Client(build_server(Settings(), sessions)) as client:
            await client.call_tool("create_session", {})
    assert heard and heard[0].startswith("mcp ") and heard[0].endswith(" over stdio")
    assert current_caller.get() == ""


async def test_on_the_socket_of_a_service_the_process_at_the_other_end_is_named() -> None:
    with own_service() as service:
        async with service.client() as client:
            await client.call_tool("list_sessions", {})
        assert service.run("service", "stop").returncode == 0
        lines = (service.paths.state / "audit.jsonl").read_text().splitlines()
    (entry,) = (one for line in lines if (one := json.loads(line)).get("tool") == "list_sessions")
    assert entry["transport"] == "socket" and entry["peer"].startswith(f"uid {os.geteuid()}, pid ")


def test_over_http_the_token_is_named_and_what_is_refused_is_written_down(tmp_path: Path) -> None:
    with guarded(tmp_path) as server:
        token = server.tokens.create("laptop")
        reader = server.tokens.create("reader", ["read"])
        server.post(call_body("tools/call", "list_sessions"), token)
        server.post(call_body("tools/call", "create_session"), reader)
        server.post(call_body(), "wrong-token-of-somebody")
        server.post(call_body(), token, Host="evil.example")
        said = server.end()
        (called,) = server.audit(tool="list_sessions")
        assert (called["token"], called["transport"]) == ("laptop", "http")
        assert called["peer"].startswith("127.0.0.1 port ")
        refused = {(entry["caller"], entry["why"]) for entry in server.audit(result="refused")}
        assert refused == {
            ("token reader", "HTTP status 403"),
            ("127.0.0.1", "HTTP status 401"),
            ("token laptop", "HTTP status 421"),
        }
        everything = said + (server.state / "audit.jsonl").read_text()
        assert not [one for one in (token, reader, "wrong-token-of-somebody") if one in everything]


def test_no_token_is_in_the_process_list_or_any_file_but_its_own(tmp_path: Path) -> None:
    with guarded(tmp_path, "--host", "0.0.0.0", "--allowed-host", "127.0.0.1") as server:
        assert server.process.stdout
        token = server.process.stdout.readline().strip().rpartition(" ")[2]
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        answer = server.post(call_body("tools/call", "list_sessions"), token)
        assert answer.status_code == 200 and token not in answer.text
        process = Path("/proc") / str(server.process.pid)
        seen = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        assert token.encode() not in seen
        server.end()
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert files and not [file for file in files if token.encode() in file.read_bytes()]


# --- secrets

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "task",
    [
        {"environment": {"MY_API_KEY": SECRET}},
        {"arguments": ["--password", SECRET]},
        {"arguments": [f"--token={SECRET}"]},
        {"arguments": ["-H", f"Authorization: Bearer {SECRET}"]},
        {"arguments": [f"https://me:{SECRET}@host.example/x"]},
        {"arguments": ["sh", "-c", f"export DB_PASSWORD='{SECRET}'; run"]},
        {"kwargs": {"auth": {"user": "me", "Password": SECRET}}},
        {"source": f"def f():\n    key = '{SECRET}'"},
        {"prompt": f"my key is {SECRET}"},
        {"arguments": [f'{{"api_key": "{SECRET}"}}']},
        {"arguments": [f"sk-{SECRET}"]},
        {"arguments": [f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n"]},
    ],
)
def test_a_secret_in_an_argument_is_not_written_down(task: dict[str, Any]) -> None:
    told = json.dumps(summary({"session": "s", "tasks": [{"name": "a", **task}]}))
    assert SECRET not in told
    assert '"session": "s"' in told and '"name": "a"' in told


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=400),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=30), inner),
    max_leaves=40,
)


@given(st.dictionaries(st.sampled_from(["tasks", "session", "source", "x"]), _TREES))
def test_whatever_the_arguments_are_what_is_written_down_is_short_json(arguments: dict[str, Any]) -> None:
    told = json.dumps(summary(arguments))
    assert len(told) <= 2500


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


# --- the file


def test_it_rotates_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "audit.jsonl", 2000)
    for number in range(400):
        log.file.write({"number": number})
    assert log.entries()[-1]["number"] == 399
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o777 == 0o600 for file in files)


def test_what_a_client_says_cannot_begin_a_line_or_move_a_cursor(log: Log) -> None:
    log.file.write({"client": 'x"}\n{"forged": true}\x1b[2J\u202e\u2028'})
    (entry,) = log.entries()
    assert entry["client"].startswith('x"}\n{"forged"')
    assert len(log.path.read_text("ascii").splitlines()) == 1


def test_two_processes_write_one_file_and_each_finds_it_again_when_the_other_rotates_it(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    one, other = AuditFile(file, 1500, 5), AuditFile(file, 1500, 5)
    one.write({"number": -1})
    one.close()
    for number in range(50):
        other.write({"number": number})
    other.close()
    last = AuditFile(file, 1500, 5)
    last.write({"number": 50})
    last.close()
    lines = [line for found in tmp_path.iterdir() for line in found.read_text().splitlines()]
    assert sorted(json.loads(line)["number"] for line in lines) == list(range(-1, 51))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=False)
    assert made.returncode == 0, "a small disk cannot be mounted here: run this test as root"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_drops_entries_counts_them_and_tears_none(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        filler = disk / "filler"
        log = AuditFile(disk / "audit.jsonl", 10_000_000, 1)
        log.write({"number": 0})
        wait_for(log)
        with filler.open("wb", buffering=0) as opened, pytest.raises(OSError, match="No space left"):
            while True:
                opened.write(b"x" * 4096)
        for number in range(1, 100):
            log.write({"number": number, "text": "x" * 100})
        wait_for(log)
        assert log.dropped > 0
        filler.unlink()
        log.write({"number": 100})
        log.close()
        entries = [json.loads(line) for line in (disk / "audit.jsonl").read_text().splitlines() if is_whole(line)]
    assert entries[0]["number"] == 0
    assert entries[-1]["number"] == 100 and entries[-1]["dropped_before"] > 0
    assert len(entries) - 1 + entries[-1]["dropped_before"] == 100


def wait_for(log: AuditFile) -> None:
    """Until what was given so far has been tried: the queue is its thread's alone to empty."""
    log._listener.stop()
    log._listener.start()


def is_whole(line: str) -> bool:
    """One line may be the half that was written as the disk got full; what follows it is whole."""
    return line.endswith("}")
