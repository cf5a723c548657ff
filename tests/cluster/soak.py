"""Runs sessions in allocations of a simulated cluster for a long time while parts of them are killed:

python -m tests.cluster.soak [MINUTES] [SEED]

Tasks are submitted all the time, and functions note each of their starts. Each half minute one fault follows, chosen at
random. In the end all tasks have ended, the results are right, and nothing is left. Then the account is printed in
Markdown.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mcp import Client

from tests.cluster.cluster import Cluster
from tests.cluster.test_pilots import Login, call
from tests.services import own_service

FAULT_S, BATCH_S, RETRIES = 30.0, 4.0, 20
FUNCTION = """
def digest(number, seconds):
    import hashlib, os, time
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(f"{number}\\n")
    time.sleep(seconds)
    return hashlib.sha256(str(number).encode()).hexdigest()
"""
NEXT = "from rhapsody_mcp.engine.process.run_dirs import RunDir; RunDir().remove()"
"""What the next process of this package on a node does first: it deletes the folders of killed processes."""
CHAINED = "def chained(digest):\n    import hashlib\n    return hashlib.sha256(digest.encode()).hexdigest()"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Soak:
    def __init__(self, login: Login, seed: int) -> None:
        self.login, self.random = login, random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.submitted = 0
        self.failures: list[dict[str, Any]] = []

    # --- faults

    async def fault(self) -> None:
        cluster = self.login.cluster
        first, second = cluster.nodes
        choices: dict[str, Callable[[], Any]] = {
            "the service is killed": lambda: os.kill(self.login.service.pid, signal.SIGKILL),
            "the pilot is killed": lambda: self.login.kill(first, "backends.pilot.pilot"),
            "a node link is killed": lambda: self.login.kill(second, "engine.node_link"),
            "the job is canceled": lambda: cluster.run("scancel", *self.login.jobs()),
            "node 2 loses its power": lambda: self._power(second),
            "node 1, the pilot's, loses its power": lambda: self._power(first),
            "node 2 is cut off for 5 s": lambda: self._cut(second),
            "the scheduler is down for 20 s": self._controller,
        }
        name = self.random.choice(list(choices))
        with suppress(ValueError, subprocess.CalledProcessError):  # nothing to kill: the job waits, or is over
            done = choices[name]()
            self.faults[name] += 1
            if asyncio.iscoroutine(done):
                await done

    async def _power(self, node: str) -> None:
        self.login.cluster.kill(node)
        await asyncio.sleep(35)  # Slurm takes 20 s to see it
        self.login.cluster.start(node)

    async def _cut(self, node: str) -> None:
        self.login.cluster.cut(node)
        await asyncio.sleep(5)
        self.login.cluster.mend(node)

    async def _controller(self) -> None:
        self.login.cluster.stop_controller()
        await asyncio.sleep(20)
        self.login.cluster.start_controller()

    async def break_things(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(FAULT_S)
            await self.fault()

    # --- tasks

    async def submit(self, until: float) -> None:
        """Submit a batch again and again, each under an idempotency key: a call that a dying service did not answer is
        repeated."""
        while time.monotonic() < until:
            numbers = range(self.submitted, self.submitted + 8)
            tasks: list[dict[str, Any]] = []
            for number in numbers:
                seconds = self.random.choice([0.1, 0.5, 2.0])
                tasks += [
                    {"name": f"d{number}", "source": FUNCTION, "args": [number, seconds], "retries": RETRIES},
                    {"name": f"c{number}", "source": CHAINED, "args": [{"ref": f"d{number}"}], "retries": RETRIES},
                ]
            job = {"name": f"j{numbers[0]}", "executable": "/bin/hostname", "ranks": 4, "ranks_per_node": 2}
            await self.persistently(
                "submit_tasks", tasks=[*tasks, {**job, "retries": RETRIES}], idempotency_key=f"batch {numbers[0]}"
            )
            self.submitted += len(numbers)
            await asyncio.sleep(BATCH_S)

    async def persistently(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool of the session, with a new client wherever the service has died."""
        while True:
            try:
                async with asyncio.timeout(60), self.login.client() as client:
                    return await call(client, tool, session="s", **arguments)
            except AssertionError:
                raise
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
                    raise
                await asyncio.sleep(1)

    # --- the account

    async def check(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        while not counts or {"QUEUED", "RUNNING", "WAITING"} & counts.keys():
            state = await self.persistently("wait_tasks", timeout_s=20)
            counts = state["counts"]
        self.failures = state["failures"]
        async with self.login.client() as client:
            wrong = [number for number in range(self.submitted) if not await self._is_right(client, number)]
            assert wrong == [], wrong
            await call(client, "close_session", session="s", force=True)
        await self.login.until_no_job()
        for node in self.login.cluster.nodes:
            self.login.cluster.run(*self.login.cluster.on(node, sys.executable, "-c", NEXT))
            left = self.login.left(node)
            assert not left, left
        return counts

    async def _is_right(self, client: Client, number: int) -> bool:
        results = [await call(client, "get_result", session="s", task=f"{kind}{number}") for kind in "dc"]
        digest = sha(str(number))
        return [result.get("result") for result in results] == [digest, sha(digest)]


async def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with Cluster(2) as cluster, own_service(cluster.shared) as service:
        service.environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
        login = Login(cluster, service)
        soak = Soak(login, seed)
        async with login.client() as client:
            await login.open(client, minutes=60, scheduler={"allocations": 1000})
        until = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(soak.submit(until))
            group.create_task(soak.break_things(until))
        counts = await soak.check()
        runs = login.runs
    out = [f"| {name} | {count} |" for name, count in sorted(soak.faults.items())]
    again = sum(count - 1 for count in runs.values())
    out += [
        "",
        f"{minutes:g} minutes, seed {seed}: {sum(counts.values()):,} tasks accepted; ended: {counts}. "
        f"{len(runs):,} functions noted their starts, which were {again} more than functions.",
        "",
        *(f"- {failure['count']} FAILED: {failure['cause']}: {failure['error']}" for failure in soak.failures),
    ]
    sys.stdout.write("\n".join(["| fault | times |", "|---|---|", *out, ""]))


asyncio.run(main())
