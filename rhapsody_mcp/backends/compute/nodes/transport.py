"""Connections between the backend and the nodes of an engine: one encrypted connection a node.

The processes of a node connect to the node's link (`engine.node_link`), which carries all their connections over its
own. Each of them looks here as if it had a connection of its own.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from contextlib import suppress

from rhapsody_mcp.backends.compute.transport import Receiver
from rhapsody_mcp.engine.messages import ToBackend
from rhapsody_mcp.engine.network.files import FileServer
from rhapsody_mcp.engine.network.link_messages import EndNode, FromNode, KeeperEnded, NodeHello, StartKeeper
from rhapsody_mcp.engine.network.multiplexer import PROCESS, Multiplexer, Stream
from rhapsody_mcp.engine.transport import Frames, frame

__all__ = ["NodeConnection", "NodeLink", "NodeTransport"]


class NodeTransport:
    """Listens for node links on all addresses of this node. Connections without the right key are refused.

    `keeper_for` makes the request with which a link starts the node agent; it is called when a link is connected.
    `on_keeper_ended` is called when a node agent and its keeper have ended, `on_link_gone` when the connection with a
    node is lost whose node agent was not ready.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        keeper_for: Callable[[NodeHello], StartKeeper],
        on_keeper_ended: Callable[[NodeLink], object] = lambda _: None,
        on_link_gone: Callable[[NodeLink], object] = lambda _: None,
    ) -> None:
        self._context, self.keeper_for = context, keeper_for
        self.on_keeper_ended, self.on_link_gone = on_keeper_ended, on_link_gone
        self.links: set[NodeLink] = set()
        """The links that are connected."""
        self.known: dict[str, NodeLink] = {}
        """All links, also those that are gone, by the folder on their node."""
        self.result_folders: set[str] = set()
        """The folders of results here whose files nodes may read."""
        self._server: asyncio.Server | None = None

    async def listen(self, receiver: Receiver) -> str:
        """Accept connections; return the number of the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: NodeLink(self, receiver).multiplexer, "0.0.0.0", 0, ssl=self._context
        )
        return str(self._server.sockets[0].getsockname()[1])

    async def end_nodes(self, within_s: float) -> list[NodeLink]:
        """Have each link end all processes of its node. Return the links that have not done so after `within_s`; their
        connections are ended."""
        links = list(self.links)
        for link in links:
            link.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(link.gone.wait() for link in links))
        for link in list(self.links):
            link.multiplexer.abort()
        return [link for link in links if link.hello is not None and link.keeper_ended is None]

    def may_read(self, path: str) -> bool:
        """Whether a node may read this file: inputs of tasks are files of a folder of results."""
        return os.path.dirname(os.path.realpath(path)) in self.result_folders

    def node_of(self, path: str) -> Multiplexer | None:
        """The connection of the node on which this file lies, in the folder of its link; None for another file."""
        link = self.known.get(os.path.dirname(os.path.dirname(path)))
        return link.multiplexer if link is not None else None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in list(self.links):
            link.multiplexer.abort()


class NodeLink:
    """The backend's end of the connection with one node."""

    def __init__(self, transport: NodeTransport, receiver: Receiver) -> None:
        self._transport, self._receiver = transport, receiver
        self._frames: Frames[FromNode] = Frames(FromNode)
        self.hello: NodeHello | None = None
        self.keeper_ended: KeeperEnded | None = None
        """The end of the latest keeper; None while a keeper runs."""
        self.has_agent = False
        """Whether the node agent of the latest keeper has been ready."""
        self.is_given_up = False
        """Whether the engine goes on without this node."""
        self.changed = asyncio.Event()
        """Set when a keeper has ended, and when the connection is lost."""
        self.gone = asyncio.Event()
        """Set when the connection is lost."""
        self.multiplexer = Multiplexer(
            is_server=True,
            open_stream=self._open_stream,
            on_first_data=lambda: transport.links.add(self),
            on_lost=self._lost,
        )
        self.multiplexer.control.user = self

    def _open_stream(self, stream: Stream, kind: bytes) -> None:
        if kind == PROCESS:
            stream.user = NodeConnection(self, self._receiver, stream)
        else:
            FileServer(stream, self._transport.may_read)

    def stream_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            match message:
                case NodeHello():
                    self.hello = message
                    self._transport.known[message.folder] = self
                    self.start_keeper()
                case KeeperEnded():
                    self.keeper_ended = message
                    self.changed.set()
                    self._transport.on_keeper_ended(self)

    def stream_ended(self) -> None:
        """Nothing: `_lost` is called too."""

    def start_keeper(self) -> None:
        """Start the node agent with its keeper, after the keeper before has ended."""
        assert self.hello is not None, "the link is connected"
        self.keeper_ended, self.has_agent = None, False
        self.changed.clear()
        self.multiplexer.control.write(frame([self._transport.keeper_for(self.hello)]))

    @property
    def host(self) -> str:
        """The name of the node."""
        return self.hello.host if self.hello is not None else "unknown"

    def keep(self) -> None:
        """Tell the link that this process lives."""
        self.multiplexer.control.write(frame([]))

    def end(self) -> None:
        self.multiplexer.control.write(frame([EndNode()]))

    def _lost(self) -> None:
        self._transport.links.discard(self)
        self.changed.set()
        self.gone.set()
        if self.hello is not None and not self.has_agent and not self.is_given_up:
            self._transport.on_link_gone(self)


class NodeConnection:
    """The connection of one process of a node."""

    def __init__(self, link: NodeLink, receiver: Receiver, stream: Stream) -> None:
        self.link = link
        self._receiver, self._stream = receiver, stream
        self._frames: Frames[ToBackend] = Frames(ToBackend)

    def stream_received(self, data: bytes) -> None:
        if messages := list(self._frames.feed(data)):
            self._receiver.received(self, messages)

    def stream_ended(self) -> None:
        self._receiver.disconnected(self)

    def send(self, *messages: object) -> None:
        self._stream.write(frame(list(messages)))

    def close(self) -> None:
        self._stream.end()
