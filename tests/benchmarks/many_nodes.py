"""Measures how many functions the dispatcher can hand out with many nodes, which are scripted, in one process:

python -m tests.benchmarks.many_nodes

Each node has 64 workers, each worker one function at a time, of 1.28 s as far as the dispatcher can see, and answers as
soon as it is asked. What counts is the CPU of the dispatcher: its own code, and the coding of its messages as frames;
sockets and TLS are not part of it. Prints a table in Markdown.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque

from rhapsody_mcp.backends.base import Ended, Event
from rhapsody_mcp.backends.compute.dispatcher import Dispatcher
from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.engine.messages import FromWorker, FunctionFinished, RunFunction, TaskStarted
from rhapsody_mcp.engine.process.gc_tuning import collect_less
from rhapsody_mcp.engine.transport import Frames, frame
from tests.unit.dispatching import Notes, finished, function

WORKERS, WAVES = 64, 4
SECONDS = 1.28
NODES = (1, 10, 100, 1000)


class ScriptedWorker:
    """Answers each function with its start and its end, in one frame."""

    def __init__(self, name: str, answers: deque[ScriptedWorker]) -> None:
        self.name = name
        self.frames: Frames[FromWorker] = Frames(FromWorker)
        self.functions: list[str] = []
        self._answers = answers

    def send(self, *messages: object) -> None:
        frame(list(messages))
        self.functions += [message.uid for message in messages if isinstance(message, RunFunction)]
        self._answers.append(self)

    def close(self) -> None: ...

    def answer(self) -> bytes:
        uids, self.functions = self.functions, []
        return frame([part for uid in uids for part in (TaskStarted(uid, 0.0), finished(uid, SECONDS))])


async def measure(nodes: int) -> tuple[int, float]:
    """The functions that ended, and the dispatcher's CPU for each, in seconds."""
    dispatcher = Dispatcher(on_exit=lambda *_: None, expected_nodes=nodes)
    answers: deque[ScriptedWorker] = deque()
    for number in range(nodes):
        agent = Notes()
        node = Node(f"n{number}", WORKERS, agent=agent)
        dispatcher.add_node(node)
        for message in agent.messages:
            worker = ScriptedWorker(message.worker, answers)  # type: ignore[attr-defined]
            dispatcher.worker_listening(worker.name, worker)
            dispatcher.worker_ready(worker.name, worker)
    count = WAVES * nodes * WORKERS
    runs = [function(f"f{number}") for number in range(count)]
    ended = 0

    def report(event: Event) -> None:
        nonlocal ended
        ended += isinstance(event, Ended)

    began = time.process_time()
    dispatcher.submit(runs, report)
    used = time.process_time() - began
    while ended < count:
        data = [(worker, worker.answer()) for worker in answers]
        answers.clear()
        began = time.process_time()
        for worker, answer in data:
            for message in worker.frames.feed(answer):
                if isinstance(message, FunctionFinished):
                    dispatcher.function_finished(worker.name, message)
                elif isinstance(message, TaskStarted):
                    dispatcher.task_started(message.uid, message.at)
        await asyncio.sleep(0)  # the dispatcher reports starts at the end of a turn of the loop
        used += time.process_time() - began
    return count, used / count


async def main() -> None:
    collect_less()
    sys.stdout.write("| nodes | workers | functions | CPU of the dispatcher a function | at most, on one core |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for nodes in NODES:
        count, cpu_s = await measure(nodes)
        row = (nodes, nodes * WORKERS, count)
        told = " | ".join(f"{number:,}" for number in row)
        sys.stdout.write(f"| {told} | {cpu_s * 1e6:.1f} µs | {1 / cpu_s:,.0f}/s |\n")


if __name__ == "__main__":
    asyncio.run(main())
