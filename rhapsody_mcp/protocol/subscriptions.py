"""Lets clients subscribe to resources, in both eras of the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mcp import MCPError
from mcp.server import ServerRequestContext
from mcp.server.connection import Connection
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp.server.subscriptions import ListenHandler, ResourceUpdated, ServerEvent
from mcp.types import (
    INVALID_PARAMS,
    EmptyResult,
    SubscribeRequestParams,
    SubscriptionsListenRequestParams,
    SubscriptionsListenResult,
    UnsubscribeRequestParams,
)

from rhapsody_mcp.protocol.resource_updates import Notices

__all__ = ["Subscriptions"]

Handling = ServerRequestContext[Any, Any]
_MOST = 1000
_KEY = "rhapsody_mcp.subscriber"


class Subscriptions:
    """`subscriptions/listen` of 2026-07-28; `resources/subscribe` and `unsubscribe` of the revisions before it.

    `check` raises ResourceNotFoundError for an address that is not in the server's list and where nothing is. A stream
    may name what is not there yet.
    """

    def __init__(self, server: MCPServer[Any], notices: Notices, check: Callable[[str], None]) -> None:
        self._server, self._notices, self._check = server, notices, check
        self._listen = ListenHandler(notices.bus)

    def serve(self) -> None:
        low_level = self._server._lowlevel_server  # MCPServer itself takes no handlers
        low_level.add_request_handler("subscriptions/listen", SubscriptionsListenRequestParams, self._on_listen)
        low_level.add_request_handler("resources/subscribe", SubscribeRequestParams, self._on_subscribe)
        low_level.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, self._on_unsubscribe)

    async def _on_listen(
        self, context: Handling, params: SubscriptionsListenRequestParams
    ) -> SubscriptionsListenResult:
        uris = set(params.notifications.resource_subscriptions or ())
        _refuse_more_than_most(len(uris))
        for uri in uris:
            self._notices.watch(uri)
        try:
            return await self._listen(context, params)
        finally:
            for uri in uris:
                self._notices.unwatch(uri)

    async def _on_subscribe(self, context: Handling, params: SubscribeRequestParams) -> EmptyResult:
        if params.uri not in [resource.uri for resource in await self._server.list_resources()]:
            try:
                self._check(params.uri)
            except ResourceNotFoundError as error:
                raise MCPError(INVALID_PARAMS, str(error), {"uri": params.uri}) from error
        self._subscriber(context).subscribe(params.uri)
        return EmptyResult()

    async def _on_unsubscribe(self, context: Handling, params: UnsubscribeRequestParams) -> EmptyResult:
        self._subscriber(context).unsubscribe(params.uri)
        return EmptyResult()

    def _subscriber(self, context: Handling) -> _Subscriber:
        connection = context.session._connection  # the only way from a request to what outlives it
        if _KEY not in connection.state:
            connection.state[_KEY] = subscriber = _Subscriber(connection, self._notices)
            connection.exit_stack.push_async_callback(subscriber.leave)
        found: _Subscriber = connection.state[_KEY]
        return found


class _Subscriber:
    """A connection with the resources that it subscribed to. One that does not read holds up nobody else."""

    def __init__(self, connection: Connection, notices: Notices) -> None:
        self._connection, self._notices = connection, notices
        self._uris: set[str] = set()
        self._changed: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._forget = notices.bus.subscribe(self._take)
        self._sending = asyncio.create_task(self._send())

    def subscribe(self, uri: str) -> None:
        if uri not in self._uris:
            _refuse_more_than_most(len(self._uris) + 1)
            self._uris.add(uri)
            self._notices.watch(uri)

    def unsubscribe(self, uri: str) -> None:
        if uri in self._uris:
            self._uris.remove(uri)
            self._notices.unwatch(uri)

    async def leave(self) -> None:
        self._forget()
        for uri in list(self._uris):
            self.unsubscribe(uri)
        self._sending.cancel()
        with suppress(asyncio.CancelledError):
            await self._sending

    def _take(self, event: ServerEvent) -> None:
        if isinstance(event, ResourceUpdated) and event.uri in self._uris:
            self._changed[event.uri] = None
            self._wake.set()

    async def _send(self) -> None:
        while await self._wake.wait():
            self._wake.clear()
            changed, self._changed = self._changed, {}
            for uri in changed:
                await self._connection.notify("notifications/resources/updated", {"uri": uri})


def _refuse_more_than_most(count: int) -> None:
    if count > _MOST:
        message = f"a client subscribes to {_MOST} resources at most; subscribe to a session in place of its tasks."
        raise MCPError(INVALID_PARAMS, message)
