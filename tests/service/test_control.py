"""What the service tells a person: whether it answers, by which settings it runs, and what its log says of its life."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.serving.daemon.client import ServiceClient
from rhapsody_mcp.serving.daemon.connection import ServiceHangs
from rhapsody_mcp.serving.daemon.unix_listener import UnixListener
from tests.bare_client import call
from tests.processes import wait_until
from tests.service.test_life import start_tasks
from tests.services import OwnService

NOT_ANSWERED = r"rhapsody-mcp: a service runs \(process {pid}\), but it has not answered within {within} s"


@contextmanager
def stopped(own: OwnService) -> Iterator[int]:
    """Within the block it does not answer, unless it was ended; its process."""
    assert own.run("service", "start").returncode == 0
    pid = own.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)


# --- whether it answers


def test_commands_to_a_service_that_does_not_answer_say_so_and_only_force_ends_it(own: OwnService) -> None:
    with stopped(own) as pid:
        with ThreadPoolExecutor() as together:  # each waits for 5 s
            commands = [("status",), ("start",), ("stop",), ("status", "--json")]
            *runs, told = together.map(lambda command: own.run("service", *command), commands)
        for ran in runs:
            assert ran.returncode == 1 and re.match(NOT_ANSWERED.format(pid=pid, within=5), ran.stderr)
            assert str(own.paths.log) in ran.stderr and f"service stop --force --folder {own.folder}" in ran.stderr
        assert told.returncode == 1 and json.loads(told.stdout)["answers"] is False
        ended = own.run("service", "stop", "--force")
        assert ended.returncode == 0 and "It is ended with SIGKILL" in ended.stdout
        assert own.run("service", "status").stdout.startswith("No service runs here")
    assert own.run("service", "start").returncode == 0


@pytest.mark.anyio
async def test_a_client_of_a_service_that_does_not_answer_is_told(own: OwnService) -> None:
    with anyio.fail_after(600), stopped(own) as pid:
        async with own.bridge() as bridge:
            assert bridge.stdin and bridge.stdout and bridge.stderr
            await bridge.stdin.send(b'{"jsonrpc": "2.0", "id": 7, "method": "tools/list"}\n')
            answer: dict[str, Any] = json.loads(await bridge.stdout.receive())
            assert answer["id"] == 7 and "it has not answered within 10 s" in answer["error"]["message"]
            assert re.match(NOT_ANSWERED.format(pid=pid, within=10), (await bridge.stderr.receive()).decode())
            await bridge.stdin.aclose()
            assert await bridge.wait() == 1


def test_a_service_that_starts_or_ends_is_not_taken_for_one_that_hangs(own: OwnService) -> None:
    with UnixListener(own.paths) as listener:
        told = [own.paths.answers_at_once]
        listener.publish("serves")
        told.append(own.paths.answers_at_once)
        with pytest.raises(ServiceHangs) as caught:
            ServiceClient(own.paths).connect_control()
        assert caught.value.pid == os.getpid()
        caught.value.connection.socket.close()
        listener.publish("ends")
        assert [*told, own.paths.answers_at_once] == [False, True, False]


# --- by which settings it runs


def test_a_start_with_other_settings_than_those_of_the_running_service_fails(own: OwnService, tmp_path: Path) -> None:
    first, other = tmp_path / "first.yaml", tmp_path / "other.yaml"
    first.write_text("wait_cap_s: 50")
    other.write_text("wait_cap_s: 5")
    assert own.run("service", "start", "--config", first).returncode == 0
    refused = own.run("service", "start", "--config", other)
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "rhapsody-mcp: the running service took its settings when it started; these differ: wait_cap_s."
    )
    assert own.run("service", "start", "--config", first).returncode == 0
    assert f"Settings: {first}\n" in own.run("service", "status").stdout
    first.write_text("wait_cap_s: 40")
    shown = own.run("service", "status").stdout
    assert f"Settings: {first}, which has changed since it started: wait_cap_s\n" in shown


# --- what it holds


@pytest.mark.anyio
async def test_it_counts_tasks_as_list_sessions_does(own: OwnService) -> None:
    each = {
        "name": "each",
        "for_each": [1, 2, 3],
        "executable": "/bin/echo",
        "arguments": ["{item}"],
        "after": ["long"],
    }
    with anyio.fail_after(600):
        await start_tasks(own)
        async with own.bridge() as bridge:
            await call(bridge, "submit_tasks", session="work", tasks=[each])
            (listed,) = (await call(bridge, "list_sessions"))["sessions"]
        assert listed["counts"] == {"RUNNING": 1, "WAITING": 4}
        assert own.status()["sessions"] == [{"session": "work", "running": 1, "queued": 0, "waiting": 4}]
        assert "Tasks have not ended in work (1 running, 0 queued, 4 waiting)." in own.run("service", "stop").stderr
        assert own.run("service", "stop", "--force").returncode == 0
    assert re.search("it was told to stop with --force, which loses 1 task$", own.paths.log.read_text(), re.M)


# --- what its log says


@pytest.mark.anyio
async def test_its_log_tells_of_its_starts_ends_and_what_was_lost(own: OwnService) -> None:
    with anyio.fail_after(600):
        await start_tasks(own)
        pid = own.pid
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not Path(f"/proc/{pid}").exists())
        async with own.bridge() as bridge:
            await call(bridge, "wait_tasks", session="work", tasks=["long"], timeout_s=50)
        async with await anyio.open_process(own.command("http", "--port", "0")) as front:
            assert front.stdout
            address = (await front.stdout.receive()).decode().strip().removeprefix("Listening on ")
            front.send_signal(signal.SIGTERM)
            assert await front.wait() == 0
        assert own.run("service", "stop", "--force").returncode == 0
    log = own.paths.log.read_text()
    for words in (
        rf"starts, process {pid}, settings of ",
        r"tasks that ran as it ended: 1 lost, 0 queued again",
        r"opened again: 1 sessions with \d tasks that have not ended",
        rf"it listens on {re.escape(address)}\n",
        rf"it listens no more on {re.escape(address)}\n",
        r"it was told to stop",
        r"process \d+ ends\n",
    ):
        assert re.search(words, log), (words, log)


def test_who_reads_only_the_first_line_of_an_answer_gets_no_traceback(shared: OwnService) -> None:
    assert shared.run("service", "start").returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        shared.command("service", "status"), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600, check=False
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")
