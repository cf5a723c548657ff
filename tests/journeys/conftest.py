"""One server for all journeys of an era of the protocol, and a new agent for each."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.agents import ERAS
from tests.journeys.travellers import Traveller, connected


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package", params=ERAS)
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Traveller]:
    """Whoever came first, whose connection the others use."""
    async with connected(request.param) as first:
        yield first


@pytest.fixture
async def agent(server: Traveller, request: pytest.FixtureRequest) -> AsyncIterator[Traveller]:
    """One who has called nothing yet. Its sessions are closed behind it."""
    agent = Traveller(server.client, server.person, server.line)
    yield agent
    request.node.user_properties += [("calls", agent.calls), ("tokens", agent.tokens)]
    for opened in (await agent.call("list_sessions"))["sessions"]:
        await agent.call("close_session", session=opened["session"], force=True)
