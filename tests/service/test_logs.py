"""What tasks print: the command `logs`, and what is kept when the service or an engine is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from mcp import Client

from tests.agents import Caller
from tests.services import OwnService

pytestmark = pytest.mark.anyio

PRINTING = "echo second >&2; echo first; until [ -e {stop} ]; do sleep 0.05; done; printf last"
FUNCTION = """
def printing(stop):
    import os, time
    print("first\\n", end="")
    while not os.path.exists(stop):
        time.sleep(0.05)
    print("last", end="")
"""


def program(stop: Path, **more: object) -> dict[str, object]:
    script = PRINTING.format(stop=stop)
    return {"name": "printing", "executable": "/bin/sh", "arguments": ["-c", script], "cores": 0.01, **more}


async def submitted(client: Client, *tasks: dict[str, object]) -> Caller:
    """Who has submitted these to session-1, and has seen them print."""
    agent = Caller(client)
    await agent.call("create_session", backends=["local"], num_workers=2)
    await agent.call("submit_tasks", session="session-1", tasks=list(tasks))
    for task in tasks:
        until = {"task": task["name"], "text": "first"}
        assert (await agent.call("wait_tasks", session="session-1", until=until))["until"]["met"]
        for rank in range(int(str(task.get("ranks", 0)))):
            which = {"session": "session-1", "task": task["name"], "rank": rank, "output": "tail"}
            with anyio.fail_after(60):
                while (await agent.call("get_result", **which)).get("stdout") != "first\n":
                    pass  # the condition was met by any rank
    return agent


async def test_logs_prints_what_is_there_and_follows_a_task_to_its_end(shared: OwnService, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    async with shared.client() as client:
        agent = await submitted(client, program(stop, ranks=2), program(stop, name="alone"))
        so_far = await anyio.to_thread.run_sync(shared.run, "logs", "session-1", "alone")
        assert (so_far.stdout, so_far.stderr, so_far.returncode) == ("first\n", "second\n", 0)
        command = shared.command("logs", "session-1", "printing", "--follow")
        async with await anyio.open_process(command) as following:
            assert following.stdout is not None
            lines = BufferedByteReceiveStream(following.stdout)
            assert {await lines.receive_until(b"\n", 99) for _ in range(2)} == {b"[0] first", b"[1] first"}
            await anyio.Path(stop).touch()
            assert {await lines.receive_until(b"\n", 99) for _ in range(2)} == {b"[0] last", b"[1] last"}
            assert await following.wait() == 0
        one = await anyio.to_thread.run_sync(shared.run, "logs", "session-1", "printing", "--rank", "1")
        assert one.stdout == "first\nlast"
        other = await anyio.to_thread.run_sync(shared.run, "logs", "session-1", "printing", "--rank", "99")
        assert (other.stdout, other.returncode) == ("", 1) and "no rank 99. Valid: 0 to 1." in other.stderr
        unknown = await anyio.to_thread.run_sync(shared.run, "logs", "session-1", "prining")
        assert unknown.returncode == 1 and "'printing'" in unknown.stderr
        await agent.call("close_session", session="session-1", force=True)


@pytest.mark.parametrize("killed", ["service", "service and keeper", "host"])
async def test_what_a_lost_task_had_printed_is_kept(own: OwnService, tmp_path: Path, killed: str) -> None:
    stop = tmp_path / "stop"
    function: dict[str, object] = {"name": "function", "source": FUNCTION, "args": [str(stop)]}
    tasks: list[dict[str, object]] = [program(stop), program(stop, name="job", ranks=2), function]
    async with own.client() as client:
        agent = await submitted(client, *tasks)
        if killed == "host":
            os.kill(process_of(own, "rhapsody_mcp.engine.host"), signal.SIGKILL)
            await agent.call("wait_tasks", session="session-1")
            await check(agent)
            return
        keeper = process_of(own, "rhapsody_mcp.engine.keeper")
        if killed == "service and keeper":
            os.kill(keeper, signal.SIGSTOP)
        os.kill(own.pid, signal.SIGKILL)
    async with own.client() as client:
        await check(Caller(client))


def process_of(own: OwnService, module: str) -> int:
    """The process of this module under the service."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}
    return next(int(pid) for pid, _, args in rows if module in args and own.pid in ancestors(int(pid), parents))


def ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    return [] if pid not in parents else [parents[pid], *ancestors(parents[pid], parents)]


async def check(agent: Caller) -> None:
    for name in ("printing", "function", "job"):
        shown = await agent.call("get_result", session="session-1", task=name, output="tail")
        assert (shown["state"], shown["cause"], shown["stdout"]) == ("FAILED", "lost", "first\n")
    rank = await agent.call("get_result", session="session-1", task="job", rank=1, output="tail")
    assert rank["stdout"] == "first\n" and rank["stderr"].startswith("second\n")
