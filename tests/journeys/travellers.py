"""Agents on a journey: MCP clients of the server as a process, whose calls and tokens are counted."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.client import ClientRequestContext, Transport
from mcp.client._transport import ReadStream, TransportStreams
from mcp.client.stdio import stdio_client
from mcp.shared.message import SessionMessage
from mcp.types import ElicitRequestParams, ElicitResult, JSONRPCResponse

from tests.agents import Caller, text_of
from tests.contract.count_tokens import tokens_of
from tests.services import CLIENT, own_service

__all__ = ["IN_ONE_ERA", "Line", "Person", "Traveller", "connected", "rows_by_name"]

IN_ONE_ERA = pytest.mark.parametrize("server", ["auto"], indirect=True)
"""For journeys that take long."""

_LONGEST_S = 600


class Person:
    """Hears what the client is asked to ask, and gives the answers that a journey lays down."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.answers: list[ElicitResult] = []

    async def __call__(self, context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        self.heard.append(params.message)
        return self.answers.pop(0)


class Line:
    """What a client's server is connected by. It can lose a reply."""

    def __init__(self) -> None:
        self._lost: anyio.Event | None = None

    def lose_next_reply(self) -> anyio.Event:
        """Gives the event that it was lost."""
        self._lost = anyio.Event()
        return self._lost

    @asynccontextmanager
    async def between(self, transport: Transport) -> AsyncIterator[TransportStreams]:
        told, heard = anyio.create_memory_object_stream[SessionMessage | Exception]()
        async with transport as (read, write), anyio.create_task_group() as group:
            group.start_soon(self._pass_on, read, told)
            yield heard, write
            group.cancel_scope.cancel()

    async def _pass_on(self, read: ReadStream[SessionMessage | Exception], told: Any) -> None:
        async with told:
            async for message in read:
                if self._lost and isinstance(message, SessionMessage) and isinstance(message.message, JSONRPCResponse):
                    self._lost.set()
                    self._lost = None
                else:
                    await told.send(message)


class Traveller(Caller):
    """An agent with one session; `tokens` is what it has had to read, text and data of each reply."""

    def __init__(self, client: Client, person: Person, line: Line) -> None:
        super().__init__(client)
        self.person, self.line = person, line
        self.session = ""

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A call that does not end fails the test."""
        with anyio.fail_after(_LONGEST_S):
            return await super().call(tool, **arguments)

    @property
    def tokens(self) -> int:
        texts = [text_of(reply) for reply in self.replies]
        data = [reply.structured_content for reply in self.replies]
        compact = [json.dumps(part, separators=(",", ":"), ensure_ascii=False) for part in data if part is not None]
        return sum(map(tokens_of, [*texts, *compact]))

    async def create(self, *backends: str, **options: Any) -> None:
        chosen = {"backends": backends} if backends else {}
        self.session = (await self.call("create_session", **chosen, **options))["session"]

    async def submit(self, *tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
        return await self.call("submit_tasks", session=self.session, tasks=list(tasks), **options)

    async def wait(self, **options: Any) -> dict[str, Any]:
        return await self.call("wait_tasks", session=self.session, **{"timeout_s": 50, **options})

    async def result(self, task: str, **options: Any) -> dict[str, Any]:
        return await self.call("get_result", session=self.session, task=task, **options)


@asynccontextmanager
async def connected(era: str, *arguments: str) -> AsyncIterator[Traveller]:
    """A traveller before a service of its own, started as every MCP client starts it."""
    with own_service() as service:
        command = service.command("stdio", *arguments)
        server = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
        person, line = Person(), Line()
        wire = line.between(stdio_client(server))
        async with Client(wire, mode=cast(Any, era), elicitation_callback=person, client_info=CLIENT) as client:
            yield Traveller(client, person, line)


def rows_by_name(waited: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the tasks that a reply of wait_tasks shows as DONE."""
    return {row["name"]: row for row in waited["done"]}
