"""Jobs over two node agents, each with an engine folder of its own on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from rhapsody_mcp.backends.base import Ended, Event, Running
from rhapsody_mcp.backends.compute.dispatcher import Dispatcher
from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.transport import Connection, UnixTransport
from rhapsody_mcp.backends.engine_process import KeeperHandle
from rhapsody_mcp.engine.messages import HostConfig, NodeReady, TaskEnded, TaskStarted, ToBackend
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Command, Layout, RankGroup, TaskRun, TaskSpec, Template
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import load_json

pytestmark = pytest.mark.anyio
PROGRAM = 'echo "$RHAPSODY_RANK of $RHAPSODY_RANKS on $RHAPSODY_NODES"'


class Agents:
    """A dispatcher with two nodes of two slots, whose node agents are real."""

    def __init__(self) -> None:
        self.dispatcher = Dispatcher(on_exit=lambda *_: None, bundles=True, expected_nodes=2)
        self.nodes: dict[Connection, Node] = {}
        self.keepers: list[KeeperHandle] = []
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        for message in messages:
            if isinstance(message, NodeReady):
                self.nodes[connection] = Node(f"node{len(self.nodes) + 1}", 2, agent=connection)
                self.dispatcher.add_node(self.nodes[connection])
            elif isinstance(message, TaskStarted):
                self.dispatcher.task_started(message.uid, message.at)
            elif isinstance(message, TaskEnded):
                self.dispatcher.task_ended(self.nodes[connection], message.uid, message.outcome)
        self._change()

    def disconnected(self, connection: Connection) -> None:
        self.dispatcher.lose_node(self.nodes[connection], "its agent is gone", set())
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def submit(self, folder: Path, work: Command | Call, *groups: RankGroup, timeout_s: float | None = None) -> None:
        layout = Layout("job", groups or (RankGroup(4, Template()),))
        spec = TaskSpec(uid="job", work=work, layout=layout, timeout_s=timeout_s)
        self.dispatcher.submit([TaskRun(spec=spec, bindings={}, results_folder=str(folder))], self.events.append)

    async def ready(self) -> None:
        while len(self.nodes) < 2:
            await self._changed.wait()

    async def started(self) -> None:
        while not any(isinstance(event, Running) for event in self.events):
            await self._changed.wait()

    async def ended(self) -> Outcome:
        while not any(isinstance(event, Ended) for event in self.events):
            await self._changed.wait()
        (outcome,) = (event.outcome for event in self.events if isinstance(event, Ended))
        return outcome


@asynccontextmanager
async def two_agents() -> AsyncIterator[Agents]:
    async with AsyncExitStack() as stack:
        agents, folder = Agents(), RunDir()
        stack.callback(folder.remove)
        transport = UnixTransport(folder.path)
        address = await transport.listen(agents)
        stack.callback(transport.close)
        for _ in range(2):
            agents.keepers.append(await start_agent(stack, address))
        with anyio.fail_after(120):
            await agents.ready()
            yield agents


async def start_agent(stack: AsyncExitStack, address: str) -> KeeperHandle:
    folder, mark = RunDir(), secrets.token_hex(8)
    stack.callback(folder.remove)
    config = HostConfig(
        launcher="local",
        mark=mark,
        address=address,
        folder=str(folder.path),
        sys_path=[entry or os.getcwd() for entry in sys.path],
        cwd=str(folder.path),
    )
    path = folder.path / "host.json"
    path.write_bytes(msgspec.json.encode(config))
    keeper = KeeperHandle(mark, "local", folder.path, None)
    command = [sys.executable, "-m", "rhapsody_mcp.engine.host", str(path)]
    await keeper.start(["--name", "test", "--log", str(folder.path / "log"), "--stop", "close"], command, os.environ)
    stack.push_async_callback(keeper.wait)
    stack.callback(keeper.stop_engine)
    return keeper


async def test_ranks_on_two_nodes_make_one_job(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(tmp_path, Command("sh", ("-c", PROGRAM)))
        outcome = await agents.ended()
    assert (outcome.state, outcome.exit_code, outcome.nodes) == (TaskState.DONE, 0, ("node1", "node2"))
    printed = [f"{rank} of 4 on node1,node2\n" for rank in range(4)]
    assert [rank.stdout.text for rank in outcome.ranks] == printed
    assert outcome.stdout.text == printed[0]
    assert outcome.value is not None and load_json(outcome.value) == printed[0].strip()
    assert len([event for event in agents.events if isinstance(event, Running)]) == 1


async def test_a_function_has_the_value_of_rank_0(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(
            tmp_path, Call("source", b"def rank():\n    import os\n    return os.environ['RHAPSODY_RANK']", "rank")
        )
        outcome = await agents.ended()
    values = [load_json(rank.value) for rank in outcome.ranks if rank.value is not None]
    assert (values, outcome.value) == (["0", "1", "2", "3"], outcome.ranks[0].value)


async def test_a_failed_rank_fails_the_job_and_independent_ranks_end_by_themselves(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(tmp_path, Command("sh", ("-c", f'test "$RHAPSODY_RANK" != 2 || exit 5; {PROGRAM}')))
        outcome = await agents.ended()
    assert (outcome.state, outcome.cause, outcome.exit_code) == (TaskState.FAILED, Cause.EXIT_CODE, 5)
    assert outcome.error == "rank 2 of 4: exit code 5; it wrote nothing to stderr"
    assert [rank.exit_code for rank in outcome.ranks] == [0, 0, 5, 0]


async def test_a_cancellation_ends_the_ranks_on_both_nodes(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(tmp_path, Command("sleep", ("1000",)))
        await agents.started()
        agents.dispatcher.stop(["job"], Cause.CANCELED)
        outcome = await agents.ended()
    assert (outcome.state, outcome.error) == (TaskState.CANCELED, "canceled on request")


async def test_a_time_limit_ends_the_ranks_on_both_nodes(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(tmp_path, Command("sleep", ("1000",)), timeout_s=0.5)
        outcome = await agents.ended()
    assert (outcome.cause, outcome.error) == (Cause.TIMEOUT, "its time of 0.5 s was up")


async def test_ranks_that_cannot_start_on_one_node_end_those_on_the_other(tmp_path: Path) -> None:
    async with two_agents() as agents:
        pinned = Template(cpu_affinity=(99_999,))
        agents.submit(tmp_path, Command("sleep", ("1000",)), RankGroup(3, Template()), RankGroup(1, pinned))
        outcome = await agents.ended()
    assert outcome.cause is Cause.INVALID and "CPU 99999 was asked for" in outcome.error
    assert [rank.error for rank in outcome.ranks[:2]] == ["ended because rank 2 failed"] * 2
    assert [rank.cause for rank in outcome.ranks] == [Cause.CANCELED] * 2 + [Cause.INVALID] * 2


async def test_a_node_that_is_gone_loses_the_job_once_its_other_ranks_have_ended(tmp_path: Path) -> None:
    async with two_agents() as agents:
        agents.submit(tmp_path, Command("sleep", ("1000",)))
        await agents.started()
        agents.keepers[1].stop_engine()
        outcome = await agents.ended()
    assert (outcome.state, outcome.cause, outcome.error) == (TaskState.FAILED, Cause.LOST, "its agent is gone")
    lost = [rank.rank for rank in outcome.ranks if rank.cause is Cause.LOST]
    ended = [rank.error for rank in outcome.ranks if rank.cause is Cause.CANCELED]
    assert len(lost) == len(ended) == 2 and ended == [f"ended because rank {lost[0]} failed"] * 2
