"""Two agents in one session."""

from __future__ import annotations

import anyio
import pytest

from tests.behaviour.test_http import connected, serving
from tests.journeys.travellers import Line, Person, Traveller, rows_by_name

pytestmark = pytest.mark.anyio


async def test_one_agent_submits_and_another_finds_the_session_waits_and_reads() -> None:
    with anyio.fail_after(600), serving("--port", "0") as (_, address):
        async with connected(address, "legacy") as one, connected(address, "auto") as other:
            first, second = Traveller(one, Person(), Line()), Traveller(other, Person(), Line())
            await first.create("local", name="shared")
            await first.submit({"name": "total", "function": "builtins:sum", "args": [[1, 2, 39]]})
            (found,) = (await second.call("list_sessions"))["sessions"]
            second.session = found["session"]
            assert rows_by_name(await second.wait())["total"]["result"] == 42
            assert (await second.result("total"))["result"] == 42
            assert (first.calls, second.calls) == (2, 3) and first.tokens + second.tokens < 800
