"""Random submissions and random kills, for as long as it is told, and then the account.

    python -m tests.faults.soak --minutes 20 --seed 7

Ends with 1 where a task was lost or doubled, where a result is not what it should be, where something is left, or
where the service's memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tests.agents import Refused
from tests.faults.grounds import nothing_special
from tests.faults.processes import memory_of, part
from tests.faults.record import Record
from tests.faults.steps import LARGE, Step, Steps, value_of
from tests.faults.world import Client, World

_KILLS = {"worker": 8, "bridge": 4, "host": 3, "keeper": 2, "launcher": 1, "service": 2}
"""What is killed, and how often in comparison."""
_BETWEEN_S = (2.0, 12.0)
_TASKS = 300
"""In a session; then it is read, checked and closed, and another is opened."""
_MORE_MEMORY = 1.5
_SETTLED_S = 60.0


class Soak:
    def __init__(self, world: World, seed: int, seconds: float) -> None:
        self.world, self.until = world, time.monotonic() + seconds
        self._began, self._seconds = time.monotonic(), seconds
        self._chance = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.problems: list[str] = []
        self.services: set[int] = set()
        self.memory: list[tuple[float, int]] = []
        self.sessions = 0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    async def run(self, *backends: str) -> None:
        async with asyncio.TaskGroup() as group:
            for backend in backends:
                group.create_task(self._use(backend))
            group.create_task(self._break())
            group.create_task(self._measure())

    # --- use

    async def _use(self, backend: str) -> None:
        while self.goes_on:
            self.sessions += 1
            await self._use_session(backend, f"soak-{self.sessions}")

    async def _use_session(self, backend: str, name: str) -> None:
        client = Client(self.world)
        with suppress(Refused):  # it was made, and the reply was lost
            await client.call("create_session", name=name, backends=[backend], num_workers=2)
        record = Record(self.world, name, client)
        made = _Maker(Steps(self.world.runs, self.world.gate), self._chance, name)
        while self.goes_on and len(record.accepted) < _TASKS:
            with suppress(Refused):  # what a task of it needs has been lost meanwhile
                await record.submit(*made.batch(), key=f"{name}-{len(record.accepted)}")
            await client.call("wait_tasks", session=name, timeout_s=self._chance.uniform(0, 3), count=3)
            await record.look()
        await record.wait()
        self.problems += [f"{name}: {problem}" for problem in await record.check({}, {})]
        self.states += Counter(record.ends[uid]["state"] for uid in record.accepted if uid in record.ends)
        with suppress(Refused):
            await client.call("close_session", session=name)
        await client.leave()

    # --- break

    async def _break(self) -> None:
        while self.goes_on:
            await asyncio.sleep(self._chance.uniform(*_BETWEEN_S))
            name = self._chance.choices(list(_KILLS), list(_KILLS.values()))[0]
            by = self._chance.choice((signal.SIGKILL, signal.SIGTERM))
            if found := part(name):
                self.kills[name] += 1
                victim = self._chance.choice(sorted(found))
                _say(f"{time.time():.2f}: {by.name} to {name}, process {victim}")
                with suppress(ProcessLookupError):
                    os.kill(victim, by)

    async def _measure(self) -> None:
        """What the service needs, every few seconds; a young one needs less."""
        while self.goes_on:
            for pid in part("service"):
                self.services.add(pid)
                with suppress(OSError):
                    self.memory.append((time.monotonic() - self._began, memory_of(pid)))
            await asyncio.sleep(5)

    # --- the account

    def account(self) -> str:
        begin, middle, end = self._memory()
        return "\n".join(
            [
                f"accepted and ended: {self.states.total()} tasks of {self.sessions} sessions: {dict(self.states)}",
                f"killed: {dict(self.kills)}; services that there were: {len(self.services)}",
                f"memory of the service: {begin >> 20} MB at the start, {middle >> 20} MB in the middle, "
                f"{end >> 20} MB at the end",
                *(self.problems or ["0 lost, 0 doubled, nothing left"]),
            ]
        )

    def _memory(self) -> tuple[int, int, int]:
        """The most of each third."""
        thirds = [[size for at, size in self.memory if int(3 * at / self._seconds) == third] for third in range(3)]
        begin, middle, end = (max(sizes, default=0) for sizes in thirds)
        return begin, middle, end

    def check_memory(self) -> None:
        begin, _, end = self._memory()
        if end > begin * _MORE_MEMORY:
            self.problems.append(f"the service grew from {begin >> 20} to {end >> 20} MB")


class _Maker:
    """Makes steps at random, some of which need the results of earlier ones."""

    def __init__(self, steps: Steps, chance: random.Random, session: str) -> None:
        self._steps, self._chance, self._session = steps, chance, session
        self._made: list[Step] = []
        self._number = 0

    def batch(self) -> list[Step]:
        steps = [self._step() for _ in range(self._chance.randint(1, 25))]
        return [replace(step, may_be_lost=True) for step in steps]

    def _step(self) -> Step:
        self._number += 1
        name = f"{self._session}.{self._number}"
        kinds: list[Callable[[str], Step]] = [self._native, self._native, self._program, self._large]
        kinds += [self._job, self._digest, self._items, self._kept]
        step = self._chance.choice(kinds)(name)
        self._made.append(step)
        return step

    def _native(self, name: str) -> Step:
        return self._steps.native(name, seconds=self._seconds())

    def _kept(self, name: str) -> Step:
        return self._steps.native(name, seconds=self._seconds(), retries=3)

    def _large(self, name: str) -> Step:
        return self._steps.native(name, size=LARGE)

    def _job(self, name: str) -> Step:
        return self._steps.job(name)

    def _program(self, name: str) -> Step:
        return self._steps.program(name)

    def _items(self, name: str) -> Step:
        lists = [step for step in self._made[-20:] if step.value == value_of(step.name, 3)]
        return self._steps.items(name, self._chance.choice(lists)) if lists else self._native(name)

    def _digest(self, name: str) -> Step:
        some = self._chance.sample(self._made[-20:], min(3, len(self._made)))
        return self._steps.digest(name, *some)

    def _seconds(self) -> float:
        return self._chance.choice((0, 0, 0.05, 1, 3))


async def soak(seed: int, minutes: float, backends: list[str]) -> int:
    async with World(nothing_special, {}) as world:
        running = Soak(world, seed, minutes * 60)
        await running.run(*backends)
        running.check_memory()
        await world.stop()
        running.problems += [f"after the stop there is left: {left}" for left in await world.left()]
    _say(running.account())
    return 1 if running.problems else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of what is random; printed")
    parser.add_argument("--backends", nargs="+", default=["local", "dragon"])
    options: Any = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    _say(f"seed {seed}, {options.minutes:g} minutes, on {', '.join(options.backends)}")
    return asyncio.run(soak(seed, options.minutes, options.backends))


if __name__ == "__main__":
    sys.exit(main())
