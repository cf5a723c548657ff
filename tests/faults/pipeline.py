"""The pipeline that every fault comes in the middle of: some of it is done, some runs, some waits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.faults.record import Record
from tests.faults.steps import LARGE, Step, Steps
from tests.faults.world import World
from tests.processes import wait_until

__all__ = ["RUNNING", "WORKERS", "Pipeline"]

WORKERS = 4
"""One more than are held: what it leaves of two cores is enough for the program and the job that are held, too."""
_LITTLE = 0.1
RUNNING = {"held-1": "lost", "sum-1": "upstream", "held-3": "lost", "program": "lost", "ranks": "lost"}
"""What cannot be DONE where all that was running is lost; held-2 has a retry."""
_MARKED_S = 60


class Pipeline:
    def __init__(self, world: World) -> None:
        self.world = world
        self.steps = Steps(world.runs, world.gate)
        self.record: Record
        self.answers: list[str] = []
        self.noticed_s: list[float] = []

    async def begin(self, *backends: str) -> None:
        """Open a session, and have the first part done and read."""
        created = await self.world.client.call("create_session", backends=backends, num_workers=WORKERS)
        self.record = Record(self.world, created["session"])
        self.numbers = self.steps.native("numbers", size=20)
        self.large = self.steps.native("large", size=LARGE)
        self.each = self.steps.items("each", self.numbers)
        await self.record.submit(self.numbers, self.large, self.each, self.steps.program("said"))
        await self.record.wait()
        await self.record.look()
        await self.record.read()

    async def reach_the_middle(self, *more: Step) -> None:
        """Returns when all that is held runs; the rest is queued behind it, or waits for it."""
        running = [
            self.steps.native("held-1", held=True),
            self.steps.native("held-2", held=True, retries=1),
            self.steps.native("held-3", held=True),
            self.steps.program("program", held=True, cores=_LITTLE),
            self.steps.job("ranks", held=True, cores=_LITTLE),
        ]
        held_1, held_2, *_ = running
        later = [self.steps.native(f"later-{number}", size=LARGE if number == 2 else 3) for number in range(1, 6)]
        await self.record.submit(*running)
        await self.record.submit(
            *later,
            self.steps.program("told"),
            self.steps.job("pair"),
            self.steps.items("again", later[0]),
            self.steps.digest("sum-1", held_1),
            self.steps.digest("sum-2", held_2, *later),
            self.steps.digest("sum-all", self.large, self.each, later[1]),
            self.steps.native("tidy", after=["held-1"], on_upstream_failure="run"),
            *more,
        )
        marks = [self.world.runs / file for step in running for file in step.files]
        await wait_until(lambda: all(map(_is_written, marks)), within_s=_MARKED_S)
        await self.record.look()

    async def finish(self, fails: Mapping[str, str], may_fail: Mapping[str, str]) -> list[str]:
        """Let everything go on to its end; gives what does not hold of it, and of the session's further use."""
        await self.record.look()
        self.world.open_gate()
        await self.record.wait()
        await self.record.submit(self.steps.native("after"), self.steps.program("after-program"))
        await self.record.wait()
        return await self.record.check(fails, may_fail)


def _is_written(mark: Path) -> bool:
    return mark.exists() and mark.read_bytes().endswith(b"\n")
