"""Asks other processes for what running tasks have printed so far."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

from rhapsody_mcp.backends.compute.in_flight import InFlightTask, Node
from rhapsody_mcp.engine.messages import ReadOutput
from rhapsody_mcp.model.live.output import OutputQuery, Printed

__all__ = ["OutputReads"]

_PATIENCE_S = 5.0


class OutputReads:
    """The questions that are not answered yet. Who does not answer in time has no output."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[Printed | None]] = {}

    async def read(self, task: InFlightTask, query: OutputQuery) -> Printed | None:
        """As `Backend.read_output`."""
        if task.worker is not None:
            is_running = next(iter(task.worker.assigned), None) == task.uid and task.is_sent
            return await self._ask_node(task.worker.node, task, task.worker.name, query) if is_running else None
        ranks = task.placement.ranks.items() if task.placement is not None else ()
        node = next((node for node, own in ranks if query.rank in own), None)
        return await self._ask_node(node, task, "", query) if node is not None else None

    async def _ask_node(self, node: Node, task: InFlightTask, worker: str, query: OutputQuery) -> Printed | None:
        return await self.ask(lambda number: node.send(ReadOutput(number, task.uid, worker, query)))

    async def ask(self, send: Callable[[int], object]) -> Printed | None:
        """Send a question with the number that `send` gets, and return the answer to this number."""
        number = next(self._numbers)
        answer: asyncio.Future[Printed | None] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            send(number)
            async with asyncio.timeout(_PATIENCE_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._answers[number]

    def answer(self, number: int, parts: Printed | None) -> None:
        if (answer := self._answers.get(number)) is not None and not answer.done():
            answer.set_result(parts)
