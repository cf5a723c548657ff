"""Subscriptions to resources, for protocol revisions before and since 2026-07-28."""

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

from rhapsody_mcp.protocol.resource_updates import ResourceUpdates

__all__ = ["Subscriptions"]

Context = ServerRequestContext[Any, Any]
_MAX_RESOURCES = 1000
_STATE_KEY = "rhapsody_mcp.subscriber"


class Subscriptions:
    """`subscriptions/listen` of 2026-07-28; `resources/subscribe` and `unsubscribe` of the revisions before it.

    `resources/subscribe` accepts a URI of the server's list, or one for which `check` does not raise
    ResourceNotFoundError. `subscriptions/listen` also accepts URIs of resources that do not exist yet.
    """

    def __init__(self, server: MCPServer[Any], updates: ResourceUpdates, check: Callable[[str], None]) -> None:
        self._server, self._updates, self._check = server, updates, check
        self._listen = ListenHandler(updates.bus)

    def serve(self) -> None:
        low_level = self._server._lowlevel_server  # MCPServer itself takes no handlers
        low_level.add_request_handler("subscriptions/listen", SubscriptionsListenRequestParams, self._on_listen)
        low_level.add_request_handler("resources/subscribe", SubscribeRequestParams, self._on_subscribe)
        low_level.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, self._on_unsubscribe)

    async def _on_listen(self, context: Context, params: SubscriptionsListenRequestParams) -> SubscriptionsListenResult:
        uris = set(params.notifications.resource_subscriptions or ())
        _check_count(len(uris))
        for uri in uris:
            self._updates.watch(uri)
        try:
            return await self._listen(context, params)
        finally:
            for uri in uris:
                self._updates.unwatch(uri)

    async def _on_subscribe(self, context: Context, params: SubscribeRequestParams) -> EmptyResult:
        if params.uri not in [resource.uri for resource in await self._server.list_resources()]:
            try:
                self._check(params.uri)
            except ResourceNotFoundError as error:
                raise MCPError(INVALID_PARAMS, str(error), {"uri": params.uri}) from error
        self._subscriber(context).subscribe(params.uri)
        return EmptyResult()

    async def _on_unsubscribe(self, context: Context, params: UnsubscribeRequestParams) -> EmptyResult:
        self._subscriber(context).unsubscribe(params.uri)
        return EmptyResult()

    def _subscriber(self, context: Context) -> _Subscriber:
        connection = context.session._connection  # the SDK has no public way from a request to its connection
        if _STATE_KEY not in connection.state:
            connection.state[_STATE_KEY] = subscriber = _Subscriber(connection, self._updates)
            connection.exit_stack.push_async_callback(subscriber.leave)
        existing: _Subscriber = connection.state[_STATE_KEY]
        return existing


class _Subscriber:
    """The subscriptions of one connection. A client that does not read delays no other client."""

    def __init__(self, connection: Connection, updates: ResourceUpdates) -> None:
        self._connection, self._updates = connection, updates
        self._uris: set[str] = set()
        self._changed: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._unsubscribe_bus = updates.bus.subscribe(self._queue)
        self._sending = asyncio.create_task(self._send())

    def subscribe(self, uri: str) -> None:
        if uri not in self._uris:
            _check_count(len(self._uris) + 1)
            self._uris.add(uri)
            self._updates.watch(uri)

    def unsubscribe(self, uri: str) -> None:
        if uri in self._uris:
            self._uris.remove(uri)
            self._updates.unwatch(uri)

    async def leave(self) -> None:
        self._unsubscribe_bus()
        for uri in list(self._uris):
            self.unsubscribe(uri)
        self._sending.cancel()
        with suppress(asyncio.CancelledError):
            await self._sending

    def _queue(self, event: ServerEvent) -> None:
        if isinstance(event, ResourceUpdated) and event.uri in self._uris:
            self._changed[event.uri] = None
            self._wake.set()

    async def _send(self) -> None:
        while await self._wake.wait():
            self._wake.clear()
            changed, self._changed = self._changed, {}
            for uri in changed:
                await self._connection.notify("notifications/resources/updated", {"uri": uri})


def _check_count(count: int) -> None:
    if count > _MAX_RESOURCES:
        message = (
            f"a client subscribes to {_MAX_RESOURCES} resources at most; subscribe to a session in place of its tasks."
        )
        raise MCPError(INVALID_PARAMS, message)
