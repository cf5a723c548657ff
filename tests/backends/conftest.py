"""The server that tests of prompts send them to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.backends.openai_stand_in import StandIn, serve


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with serve(StandIn()) as stand_in:
        yield stand_in
