"""Fixtures for tests of what agents see."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.agents import ERAS, Agent, open_agent


@pytest.fixture(params=ERAS)
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    async with open_agent(request.param) as opened:
        await opened.session()
        yield opened
