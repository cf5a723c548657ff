"""Runs one row of the table."""

from __future__ import annotations

import asyncio
import time

from tests.faults.pipeline import Pipeline
from tests.faults.prompts import ask
from tests.faults.rows import Row
from tests.faults.world import World

__all__ = ["run_row"]


async def run_row(row: Row) -> float:
    """Break it, and check all that must hold. Gives the seconds from the fault until its last victim had ended."""
    async with asyncio.timeout(row.limit_s), World(row.on, row.settings) as world:
        pipeline = Pipeline(world)
        await pipeline.begin(*row.backends)
        if "vllm" in row.backends:
            await ask(pipeline)
        await pipeline.reach_the_middle()
        broken = time.monotonic()
        await row.fault(pipeline)
        await pipeline.record.ended(*_victims(row))
        noticed_s = max(pipeline.noticed_s, default=time.monotonic() - broken)
        problems = await pipeline.finish(row.fails, row.may_fail)
        await world.stop()
        problems += [f"after the stop there is left: {left}" for left in await world.left()]
    assert not problems, "\n".join(problems)
    return noticed_s


def _victims(row: Row) -> list[str]:
    """Those that end although the gate is closed. A job ends with its last rank."""
    lost = [name for name, cause in row.fails.items() if cause in ("lost", "crashed")]
    return [name for name in lost if (name, row.fails[name]) != ("ranks", "crashed")]
