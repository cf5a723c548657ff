"""Limits uvicorn's HTTP connections: their number, and the time that a client takes to send a request head."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rhapsody_mcp.serving.peer_credentials import Peer

__all__ = ["connection_class"]

_HEAD_TIMEOUT_S, _MAX_CONNECTIONS = 30.0, 512


class _Connection(H11Protocol):
    """Adds to the state of each request the `peer`, and `cut`, which aborts the connection.

    uvicorn's own limit of idle time does not end the connection of a client that sends a head byte by byte.
    """

    head_timeout_s, max_connections = _HEAD_TIMEOUT_S, _MAX_CONNECTIONS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            peer = Peer.of(transport.get_extra_info("socket"))
        except OSError:  # the client has left already
            transport.abort()
            return
        self.app_state = {**self.app_state, "peer": peer, "cut": transport.abort}
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._set_timer(waiting=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_timer(self._is_waiting())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_timer(self.conn.their_state is h11.SEND_BODY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(waiting=False)
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        """Whether the rest of a head is missing, or the rest of a body that no application reads any more."""
        answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or (answered and self.conn.their_state is h11.SEND_BODY)

    def _set_timer(self, waiting: bool) -> None:
        if waiting and self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)
        elif not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class(
    head_timeout_s: float = _HEAD_TIMEOUT_S, max_connections: int = _MAX_CONNECTIONS
) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn with these limits."""
    limits = {"head_timeout_s": head_timeout_s, "max_connections": max_connections}
    return type("Connection", (_Connection,), limits)
