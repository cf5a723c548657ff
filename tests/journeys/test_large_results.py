"""Results that no agent can read, and what it reads of them."""

from __future__ import annotations

import anyio
import pytest

from rhapsody_mcp.toolsets.replies.base import REPLY_BYTES, size_of
from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

COUNT = 6_400_000
NOISE = """
def noise():
    for number in range(250_000):
        print("needle" if number == 123_456 else f"line {number:07} of many")
"""


async def test_of_50_mb_the_agent_reads_parts_and_hands_on_the_whole_by_reference(agent: Traveller) -> None:
    with anyio.fail_after(600):
        await agent.create("local")
        await agent.submit(
            {"name": "numbers", "source": "def numbers(count):\n    return list(range(count))", "args": [COUNT]},
            {"name": "noise", "source": NOISE},
            {"name": "total", "function": "builtins:sum", "args": [{"ref": "numbers"}]},
        )
        waited = await agent.wait()
        assert rows_by_name(waited)["total"]["result"] == COUNT * (COUNT - 1) // 2
        whole = await agent.result("numbers")
        assert whole["result_bytes"] > 50_000_000 and whole["total"] == COUNT
        assert (await agent.result("numbers", path="/6000000"))["result"] == 6_000_000
        assert (await agent.result("numbers", start=-3))["result"] == [COUNT - 3, COUNT - 2, COUNT - 1]
        found = await agent.result("noise", search="NEEDLE|no such")
        assert found["stdout"] == "123457: needle" and found["stdout_bytes"] > 5_000_000
    assert all(size_of(reply) <= REPLY_BYTES for reply in agent.replies)
    assert agent.calls == 7 and agent.tokens < 25_000
