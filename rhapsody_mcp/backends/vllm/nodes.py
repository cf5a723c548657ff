"""The vLLM servers on the other nodes of an allocation, each reached through the link of its node."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import EngineBook
from rhapsody_mcp.backends.compute.nodes.keys import new_key
from rhapsody_mcp.backends.compute.nodes.steps import step_on
from rhapsody_mcp.backends.compute.nodes.transport import NodeConnection, NodeTransport
from rhapsody_mcp.backends.compute.transport import Connection
from rhapsody_mcp.backends.engine_process import KeeperHandle, last_lines
from rhapsody_mcp.backends.inference.openai_client import ChatServer
from rhapsody_mcp.backends.vllm.config import VllmConfig
from rhapsody_mcp.engine.messages import ServersLost, ServersReady, ServersRefused, ToBackend
from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.addresses import reachable_addresses
from rhapsody_mcp.engine.network.link_messages import LinkSettings, NodeHello, StartKeeper
from rhapsody_mcp.engine.network.ports import forward_port
from rhapsody_mcp.engine.node.hardware import is_host
from rhapsody_mcp.engine.node_link import NODE_LINK, SOCKET
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.schedulers.allocation import current_allocation

__all__ = ["NodeServersConfig", "RemoteServer", "ServerNodes", "other_hosts", "with_share"]

_KEEPER = "servers"
_LEASE_S = 60.0
_END_S = 25.0


def other_hosts(num_nodes: int) -> list[str]:
    """The nodes besides this one on which servers run, of the allocation that this process is in; -1 stands for all.

    Raises InvalidSettings where the allocation has too few nodes, or there is none.
    """
    allocation = current_allocation(os.environ)
    nodes = allocation.nodes if allocation is not None else ()
    others = [node for node in nodes if not is_host(node, socket.gethostname())]
    if num_nodes == -1 or num_nodes == 1:
        return others if num_nodes == -1 else []
    if num_nodes > 1 + len(others):
        there = f"an allocation of {len(nodes)} nodes" if nodes else "no allocation of a scheduler"
        raise InvalidSettings(
            f"num_nodes is {num_nodes}, and this process is in {there}. Lower num_nodes, or ask the scheduler for more "
            "nodes (nodes in create_session)."
        )
    return others[: num_nodes - 1]


def with_share(config: VllmConfig, nodes: int) -> VllmConfig:
    """The configuration of one node of so many. Raises InvalidSettings where num_gpus cannot be shared evenly."""
    gpus = config.hardware.num_gpus
    if nodes == 1 or gpus is None or gpus <= 0:
        return config
    if gpus % nodes:
        raise InvalidSettings(
            f"num_gpus is {gpus}, which {nodes} nodes cannot share evenly; valid is a multiple of it."
        )
    return config.model_copy(update={"hardware": config.hardware.model_copy(update={"num_gpus": gpus // nodes})})


class NodeServersConfig(msgspec.Struct, frozen=True):
    """The configuration of the servers of one node: `address` is the Unix socket of the node link, `arguments` are
    those of the backend's class."""

    address: str
    api_key: str
    arguments: dict[str, Any]


class RemoteServer(ChatServer):
    """A vLLM server on another node; `close` ends the forwarding of its port."""

    def __init__(self, host: str, port: int, forwarded: asyncio.Server, api_key: str) -> None:
        local_port = forwarded.sockets[0].getsockname()[1]
        super().__init__(f"http://127.0.0.1:{local_port}/v1", api_key)
        self.host, self.port, self._forwarded = host, port, forwarded

    async def close(self) -> None:
        self._forwarded.close()
        await super().close()


class ServerNodes:
    """Starts servers on the nodes `hosts` by one step, and ends them.

    `on_ready` gets each server that answers, at the start and after a restart; `on_lost` each that does not any more.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        arguments: Mapping[str, Any],
        api_key: str,
        environment: Mapping[str, str],
        *,
        folder: Path,
        book: EngineBook | None,
        on_ready: Callable[[RemoteServer], None],
        on_lost: Callable[[RemoteServer, str], None],
    ) -> None:
        self._hosts, self._arguments, self._api_key = hosts, dict(arguments), api_key
        self._environment, self._folder, self._book = environment, folder, book
        self._on_ready, self._on_lost = on_ready, on_lost
        self._key, self._mark = new_key(), secrets.token_hex(8)
        self._transport = NodeTransport(tls.context(self._key, server=True), self._keeper_for)
        self._keeper: KeeperHandle | None = None
        self._ending: asyncio.Task[int] | None = None
        self._speaking: asyncio.Task[None] | None = None
        self.servers: dict[tuple[str, int], RemoteServer] = {}
        """The servers that answer, by host and port."""
        self._keys: dict[Connection, set[tuple[str, int]]] = {}
        """The keys of the servers of each node."""
        self._background: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ready_hosts: set[str] = set()

    async def start(self, within_s: float) -> None:
        """Return when the servers of all nodes answer. Raises BackendUnavailable or InvalidSettings."""
        port = await self._transport.listen(self)
        settings = LinkSettings(reachable_addresses(), int(port), self._key, _LEASE_S)
        log = self._folder / "nodes.log"
        self._keeper = KeeperHandle(self._mark, "vllm", self._folder, self._book)
        await self._keeper.start(
            ["--name", "vllm-nodes", "--log", str(log), "--stop", "term"],
            step_on(self._hosts, [sys.executable, "-m", "rhapsody_mcp.engine.node_link"]),
            {**self._environment, NODE_LINK: msgspec.json.encode(settings).decode()},
        )
        self._ending = asyncio.create_task(self._keeper.wait())
        self._speaking = asyncio.create_task(self._keep_alive())
        ends: set[asyncio.Future[Any]] = {self._ready, self._ending}
        await asyncio.wait(ends, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if self._ready.done():
            self._ready.result()
            return
        missing = sorted(set(self._hosts) - self._ready_hosts)
        what = f"the vLLM servers of {', '.join(missing)} were not ready in {within_s:.0f} s"
        raise BackendUnavailable(": ".join(filter(None, [what, last_lines(log, 3)])))

    async def _keep_alive(self) -> None:
        """Let the links hear that this process lives: each ends its node after the lease."""
        while True:
            for link in self._transport.links:
                link.keep()
            await asyncio.sleep(_LEASE_S / 6)

    def _keeper_for(self, hello: NodeHello) -> StartKeeper:
        config = NodeServersConfig(f"{hello.folder}/{SOCKET}", self._api_key, self._arguments)
        file = f"{hello.folder}/{_KEEPER}/servers.json"
        program = [sys.executable, "-P", "-m", "rhapsody_mcp.backends.vllm.node_servers", file]
        return StartKeeper(
            _KEEPER,
            f"{self._mark}.{hello.host}",
            ["--name", "vllm-node", "--stop", "term", "--grace", str(_END_S), "--", *program],
            {"servers.json": msgspec.json.encode(config)},
            dict(self._environment),
        )

    async def stop(self) -> None:
        """End the servers of all nodes; return when none of their processes is left."""
        if self._speaking is not None:
            self._speaking.cancel()
        await self._transport.end_nodes(_END_S)
        if self._keeper is not None and self._ending is not None:
            self._keeper.stop_engine()
            await self._ending
        self._transport.close()
        for server in self.servers.values():
            await server.close()
        self.servers.clear()

    # --- what the nodes say

    def received(self, connection: Connection, messages: Sequence[ToBackend]) -> None:
        for message in messages:
            match message:
                case ServersReady():
                    self._do(self._open(connection, message))
                case ServersLost():
                    keys = self._keys.get(connection, set())
                    self._lose({key for key in keys if key[1] in message.ports}, message.reason)
                case ServersRefused():
                    self._refuse(message)

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def disconnected(self, connection: Connection) -> None:
        self._lose(self._keys.pop(connection, set()), "the connection with its node was lost")

    async def _open(self, connection: Connection, message: ServersReady) -> None:
        assert isinstance(connection, NodeConnection), "nodes connect through the node transport"
        keys = self._keys.setdefault(connection, set())
        for port in message.ports:
            if (key := (message.host, port)) in self.servers:
                continue
            keys.add(key)
            forwarded = await forward_port(connection.link.multiplexer, port)
            server = self.servers[key] = RemoteServer(message.host, port, forwarded, self._api_key)
            with suppress(Exception):  # a server that dies again at once is reported as lost
                await server.ask_models()
            self._on_ready(server)
        self._ready_hosts.add(message.host)
        if len(self._ready_hosts) == len(self._hosts) and not self._ready.done():
            self._ready.set_result(None)

    def _lose(self, keys: Set[tuple[str, int]], reason: str) -> None:
        for key in keys & self.servers.keys():
            server = self.servers.pop(key)
            self._on_lost(server, f"the vLLM server on {key[0]}: {reason}")
            self._do(server.close())

    def _refuse(self, message: ServersRefused) -> None:
        if not self._ready.done():
            error = BackendUnavailable if message.again else InvalidSettings
            self._ready.set_exception(error(f"on node {message.host}: {message.reason}"))
