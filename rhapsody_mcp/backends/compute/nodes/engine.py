"""An engine with several nodes: a launcher starts a node link on each, and each link starts a node agent."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from itertools import count, groupby
from typing import Any, NamedTuple

import msgspec

from rhapsody_mcp.backends.base import Report
from rhapsody_mcp.backends.compute.crashes import noted_starts
from rhapsody_mcp.backends.compute.engine import Engine, EngineConfig
from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.nodes.keys import new_key
from rhapsody_mcp.backends.compute.nodes.mpi_steps import MpiSteps
from rhapsody_mcp.backends.compute.nodes.result_files import ResultFiles
from rhapsody_mcp.backends.compute.nodes.steps import end_orphaned_steps, step_on, succeeds
from rhapsody_mcp.backends.compute.nodes.transport import NodeConnection, NodeLink, NodeTransport
from rhapsody_mcp.backends.compute.placement import slots_of_nodes
from rhapsody_mcp.backends.compute.transport import Connection, Transport
from rhapsody_mcp.backends.engine_process import KeeperHandle
from rhapsody_mcp.engine.messages import NodeReady, OutputTaken, StepEnded, TakeOutput
from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.addresses import reachable_addresses
from rhapsody_mcp.engine.network.link_messages import LinkSettings, NodeHello, StartKeeper
from rhapsody_mcp.engine.node.hardware import is_host
from rhapsody_mcp.engine.node_link import NODE_LINK, SOCKET
from rhapsody_mcp.engine.process.liveness import MIN_CHECKS
from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.values import Stream

__all__ = ["MultiNodeEngine", "NodesConfig"]

_AGENT_STARTS = 3
"""How often the node agent of one link is started before the node is given up."""
_KILL_S = 5.0
"""How long a node link may take to kill the processes of its node once its lease is over, in seconds."""
_END_S = 15.0
_CLEAR_S = 30.0
"""How long a step may take that deletes files of Dragon on all nodes, in seconds."""
_JOIN_S = 60.0
"""How long the engine waits for further nodes once the first has joined, in seconds."""
_AGAIN_S = 60.0
"""How long a node agent that is started again may take, in seconds."""


class NodesConfig(NamedTuple):
    """`command` starts one node link on each of the nodes with these names; it runs on this node, with `NODE_LINK` in
    its environment. `leaves_files` says whether a killed command may leave files on the nodes."""

    names: list[str]
    command: list[str]
    network_prefix: str | None = None
    """A regular expression for the names of the interfaces by which the nodes reach this node; None for all."""
    leaves_files: bool = False
    needs_host_file: bool = False
    """Whether the command takes its nodes from the file that `SLURM_HOSTFILE` names: else srun would choose among all
    nodes of the allocation, with those that are dead."""


class MultiNodeEngine(Engine):
    """The start waits for all nodes, for a minute after the first. A node that dies takes its own tasks with it, and
    the others go on; the engine is lost with its last node. `on_node_lost` is called with the reason, and with the name
    of the node where later engines should not use the node.

    A node that has been silent for `stall_s` counts as dead. Its tasks end, or run elsewhere, only after a step on that
    node has seen that nothing is left there, or after its lease of `stall_s` is over too: by then its link has ended
    every process there.
    """

    def __init__(
        self, config: EngineConfig, nodes: NodesConfig, on_node_lost: Callable[[str, str | None], object]
    ) -> None:
        self._nodes_config, self._on_node_lost, self._key = nodes, on_node_lost, new_key()
        self._task_environment: dict[str, str] = {}
        self._launcher_environment: dict[str, str] = {}
        self._shares = slots_of_nodes(max(config.slots or 0, config.num_nodes), [1] * config.num_nodes)
        """The slots of each node where their number is given: all nodes have the same share, in order of joining."""
        self._slots: dict[str, int] = {}
        self._agent_numbers = count(1)
        self._dead: set[str] = set()
        """The names of nodes on which no step runs any more."""
        self._agent_starts: defaultdict[NodeLink, int] = defaultdict(int)
        self._losses_in_progress: set[asyncio.Task[None]] = set()
        self._result_files = ResultFiles(lambda path: self._node_transport.node_of(path))
        self._outputs: dict[tuple[Connection, str], asyncio.Future[tuple[Stream, Stream]]] = {}
        super().__init__(config)
        self._steps = MpiSteps(self.folder.path, lambda: self._task_environment, config.book, self._on_step_ended)

    # --- its start

    def _make_transport(self) -> Transport:
        context = tls.context(self._key, server=True)
        self._node_transport = NodeTransport(context, self._agent_keeper, self._on_keeper_ended, self._on_link_gone)
        return self._node_transport

    async def _start_keeper(self, address: str) -> KeeperHandle:
        """Start the keeper of the launcher; `address` is the number of the port for node links."""
        config, nodes = self.config, self._nodes_config
        environment = await config.environment.build()
        self._task_environment = config.task_environment(environment)
        addresses = reachable_addresses(nodes.network_prefix)
        settings = LinkSettings(addresses, int(address), self._key, config.stall_s)
        self._launcher_environment = config.host_environment(self.folder.path, environment)
        self.watches.append(asyncio.create_task(self._keep_links()))
        link = {NODE_LINK: msgspec.json.encode(settings).decode()}
        return await self.start_keeper_of(nodes.command, self._launcher_environment | self._host_file() | link)

    def _host_file(self) -> dict[str, str]:
        """The variables that have srun take these nodes of the allocation."""
        names = self._nodes_config.names
        if not self._nodes_config.needs_host_file:
            return {}
        file = self.folder.path / "hosts"
        file.write_text("".join(f"{name}\n" for name in names))
        return {"SLURM_HOSTFILE": str(file), **dict.fromkeys(("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), str(len(names)))}

    async def _keep_links(self) -> None:
        """Have each link hear something often: pings go to node agents only, once all have joined."""
        while True:
            for link in self._node_transport.links:
                link.keep()
            await asyncio.sleep(self.config.stall_s / MIN_CHECKS)

    def _agent_keeper(self, hello: NodeHello) -> StartKeeper:
        name = f"agent{next(self._agent_numbers)}"
        mark, folder = f"{self.mark}.{name}", f"{hello.folder}/{name}"
        host = msgspec.structs.replace(
            self.host_config(mark, f"{hello.folder}/{SOCKET}", folder),
            launcher="local",
            link_folder=hello.folder,
        )
        return StartKeeper(
            name,
            mark,
            [
                *["--name", self.config.backend_name, "--stop", "close", "--"],
                *[sys.executable, "-m", "rhapsody_mcp.engine.host", f"{folder}/host.json"],
            ],
            {"host.json": msgspec.json.encode(host)},
            self._task_environment,
        )

    def _slots_of(self, node: NodeReady) -> int:
        if self.config.slots is None:
            return node.cores
        if node.host not in self._slots:
            self._slots[node.host] = self._shares[len(self._slots)]
        return self._slots[node.host]

    def _on_node_ready(self, agent: Connection, message: NodeReady) -> None:
        _link_of(agent).has_agent = True
        is_first = not self.agents and not self.nodes_ready.done()
        super()._on_node_ready(agent, message)
        if is_first:
            self.watches.append(asyncio.create_task(self._wait_for_others()))

    async def _wait_for_others(self) -> None:
        """Go on without the nodes that do not join."""
        await asyncio.wait([self.nodes_ready], timeout=_JOIN_S)
        if self.nodes_ready.done():
            return
        joined = [node.name for node in self.agents.values()]
        for name in self._nodes_config.names:
            if not any(is_host(name, host) for host in joined):
                self._on_node_lost(f"node {name} did not join in {_JOIN_S:g} s{self.last_words()}", name)
        self.dispatcher.processes.expect_nodes(len(joined))
        self.nodes_ready.set_result(None)

    def _on_keeper_ended(self, link: NodeLink) -> None:
        """A node agent has ended; where it was connected, `_lose_node` waits for its keeper."""
        if link.has_agent:
            return
        reason = f"node {link.host} has no node agent{_log_of(link)}"
        if self.nodes_ready.done():
            self._start_again_or_lose(link, reason)
        else:
            self.lose(reason)

    def _on_link_gone(self, link: NodeLink) -> None:
        """A node is gone before its node agent was there again."""
        if self.nodes_ready.done():
            self._start_again_or_lose(link, f"node {link.host} was lost: it does not answer")

    # --- tasks

    def submit(self, task_runs: Sequence[TaskRun], report: Report) -> None:
        for folder, runs in groupby(task_runs, lambda task_run: task_run.results_folder):
            self._node_transport.result_folders.add(os.path.realpath(folder))
            super().submit(list(runs), self._result_files.report_with(report, folder))

    def _run_step(self, uid: str, ranks: Sequence[tuple[Node, str]]) -> None:
        self._steps.run(uid, ranks)

    def _on_step_ended(self, uid: str, problem: str) -> None:
        for agent in self.agents:
            agent.send(StepEnded(uid, problem))

    # --- the loss of a node

    def _on_silent_agent(self, agent: Connection) -> None:
        _link_of(agent).multiplexer.abort()

    def _on_agent_gone(self, agent: Connection, node: Node) -> None:
        if self.loss is not None:
            return
        self._follow_loss(self._lose_node(_link_of(agent), node))

    def _follow_loss(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._losses_in_progress.add(losing := asyncio.create_task(coroutine))
        losing.add_done_callback(self._losses_in_progress.discard)

    async def _lose_node(self, link: NodeLink, node: Node) -> None:
        """Take a node out of the engine once no process of it is left; start its agent again where its link lives."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await link.changed.wait()
        has_ended = is_usable = link.keeper_ended is not None
        if not has_ended:
            link.multiplexer.abort()
            is_usable = await self._clear(link)
        functions = [task for worker in node.workers.values() for task in worker.assigned.values()]
        started = await noted_starts(functions)
        if not has_ended:  # without the word of its keeper, each function that was sent to the node may have started
            started |= {(task.uid, task.task_run.attempt) for task in functions if task.is_sent}
        why = f"its node agent ended{_log_of(link)}" if has_ended else "it does not answer"
        reason = f"node {node.name} was lost: {why}"
        self.dispatcher.lose_node(node, reason, started)
        self.check_workers_ready()
        self._start_again_or_lose(link, reason, is_usable)

    def _start_again_or_lose(self, link: NodeLink, reason: str, is_usable: bool = True) -> None:
        if self.loss is not None:
            return
        self._agent_starts[link] += 1
        if link.keeper_ended is not None and not link.gone.is_set() and self._agent_starts[link] < _AGENT_STARTS:
            self._on_node_lost(f"{reason}; it joins again", None)
            link.start_keeper()
            asyncio.get_running_loop().call_later(_AGAIN_S, self._lose_if_silent, link, self._agent_starts[link])
            return
        link.is_given_up = True
        self.dispatcher.processes.give_up_node(link.host, reason)
        self._on_node_lost(reason, None if is_usable else link.host)
        link.end()
        if not self.agents:
            self.lose(f"the engine of {self.backend_words} lost its last node: {reason}")

    def _lose_if_silent(self, link: NodeLink, starts: int) -> None:
        """Take the node whose agent was started again, and has not come, for lost: the agent hangs."""
        if self.loss is None and not link.has_agent and not link.gone.is_set() and self._agent_starts[link] == starts:
            self._follow_loss(self._lose_silent(link))

    async def _lose_silent(self, link: NodeLink) -> None:
        link.is_given_up = True
        link.multiplexer.abort()
        is_usable = await self._clear(link)
        self._start_again_or_lose(link, f"node {link.host} was lost: it does not answer", is_usable)

    async def _clear(self, link: NodeLink) -> bool:
        """Wait until nothing of the engine is left on the node of a link that does not answer: until a step there has
        ended what was left, which gives True, or until the lease is over."""
        assert link.hello is not None, "the link was connected"
        names = [name for name in self._nodes_config.names if is_host(name, link.host)]
        loop, within_s = asyncio.get_running_loop(), self.config.stall_s + _KILL_S
        lease_end = loop.time() + within_s
        if await self._clear_nodes(names, link.hello.folder, within_s=within_s):
            return True
        await asyncio.sleep(max(0.0, lease_end - loop.time()))
        self._dead.update(names)
        return False

    async def _clear_nodes(self, names: Sequence[str], *folders: str, within_s: float) -> bool:
        """Have a step on these nodes end and delete what was left; return whether nothing is left."""
        command = [sys.executable, "-m", "rhapsody_mcp.engine.clear_node", *folders]
        return bool(names) and await succeeds(step_on(names, command), self._launcher_environment, within_s)

    # --- its end

    async def _end_processes(self, patience_s: float) -> None:
        await asyncio.gather(*self._losses_in_progress)
        await self._result_files.finish()
        await self._steps.close()
        silent = await self._node_transport.end_nodes(_END_S)
        await super()._end_processes(patience_s)
        await end_orphaned_steps(self._launcher_environment)
        await asyncio.gather(*map(self._clear, silent))
        if self._nodes_config.leaves_files:
            living = [name for name in self._nodes_config.names if name not in self._dead]
            await self._clear_nodes(living, within_s=_CLEAR_S)

    # --- the output of workers that have exited

    async def _take_output(self, agent: Connection, path: str, folder: str | None) -> tuple[Stream, Stream]:
        if agent not in self.agents:
            return Stream(), Stream()
        answer: asyncio.Future[tuple[Stream, Stream]] = asyncio.get_running_loop().create_future()
        self._outputs[agent, path] = answer
        agent.send(TakeOutput(path, folder, self.config.caps.output_bytes))
        return await answer

    def _on_output_taken(self, agent: Connection, message: OutputTaken) -> None:
        if (answer := self._outputs.pop((agent, message.output_path), None)) is not None:
            answer.set_result((message.stdout, message.stderr))

    def disconnected(self, connection: Connection) -> None:
        for agent, path in [key for key in self._outputs if key[0] is connection]:
            self._outputs.pop((agent, path)).set_result((Stream(), Stream()))
        super().disconnected(connection)


def _log_of(link: NodeLink) -> str:
    """The end of the log of a link's last keeper, as the end of a sentence."""
    lines = link.keeper_ended.log.strip().splitlines() if link.keeper_ended is not None else []
    return f": {' | '.join(lines[-3:])}" if lines else ""


def _link_of(agent: Connection) -> NodeLink:
    assert isinstance(agent, NodeConnection), "nodes connect through the node transport"
    return agent.link
