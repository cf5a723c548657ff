"""Questions to other processes for what running tasks have printed so far."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

from rhapsody_mcp.model.live.output import Printed

__all__ = ["OutputReads"]

_PATIENCE_S = 5.0


class OutputReads:
    """The questions that are not answered yet. Who does not answer in time has no output."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[Printed | None]] = {}

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
