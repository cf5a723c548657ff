"""HTTP connections as uvicorn makes them, which end where their client is slow or where there are too many."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rhapsody_mcp.serving.peer_credentials import Peer

__all__ = ["connections"]

SLOW_S, MOST = 30.0, 512


class _Connection(H11Protocol):
    """Each request finds in its state who is at the other end (`peer`), and what ends the connection (`cut`).

    uvicorn bounds how long a connection is idle; what a client sends byte by byte keeps it, but not here.
    """

    slow_s, most = SLOW_S, MOST

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            peer = Peer.of(transport.get_extra_info("socket"))
        except OSError:  # it has gone already
            transport.abort()
            return
        self.app_state = {**self.app_state, "peer": peer, "cut": transport.abort}
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._watch(waiting=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(self._is_waiting())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(self.conn.their_state is h11.SEND_BODY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(waiting=False)
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        """For the rest of a request's head, or for the end of a body that nobody reads any more."""
        answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or (answered and self.conn.their_state is h11.SEND_BODY)

    def _watch(self, waiting: bool) -> None:
        if waiting and self._late is None:
            self._late = self.loop.call_later(self.slow_s, self.transport.abort)
        elif not waiting and self._late is not None:
            self._late.cancel()
            self._late = None


def connections(slow_s: float = SLOW_S, most: int = MOST) -> type[asyncio.Protocol]:
    """A kind of connection whose client has `slow_s` for the head of a request, and of which there are `most`."""
    return type("Connection", (_Connection,), {"slow_s": slow_s, "most": most})
