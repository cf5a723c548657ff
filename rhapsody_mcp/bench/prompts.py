"""The rows of prompts. Both sides use the same vLLM server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx2

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends import DragonVllmInferenceBackend
from rhapsody_mcp.bench.compute import run
from rhapsody_mcp.bench.measurement import Row
from rhapsody_mcp.model.errors import RhapsodyError

__all__ = ["prompt_rows", "rows_on"]

_TOKENS = 32
_BATCH = 256


@asynccontextmanager
async def prompt_rows(same: int, different: int) -> AsyncIterator[list[Row]]:
    backend = await DragonVllmInferenceBackend(model="shipped", device="auto", max_batch_size=_BATCH)
    async with Session([backend]) as session, rows_on(session, backend, same, different) as rows:
        yield rows


@asynccontextmanager
async def rows_on(
    session: Session, backend: DragonVllmInferenceBackend, same: int, different: int
) -> AsyncIterator[list[Row]]:
    """The rows for a session with this backend, whose server is ready."""
    headers = {"Authorization": f"Bearer {backend.api_key}"}
    limits = httpx2.Limits(max_connections=different)
    async with httpx2.AsyncClient(base_url=backend.urls[0], headers=headers, timeout=None, limits=limits) as client:
        yield [
            Row(
                f"{same:,} prompts, the same parameters",
                partial(_time_list, session, same),
                partial(_time_batches, client, same),
                same,
                "rate",
                f"the server's batch endpoint, {_BATCH} at a time",
            ),
            Row(
                f"{different} prompts, all of other parameters",
                partial(_time_singles, session, different),
                partial(_time_requests, client, different),
                different,
                "rate",
                "requests to the server, all at once",
            ),
            Row(
                "one prompt",
                partial(_time_singles, session, 1),
                partial(_time_requests, client, 1),
                bare="a request to the server",
            ),
        ]


def _prompt(number: int) -> str:
    return f"Write a labelled sample, number {number}."


async def _time_list(session: Session, count: int) -> float:
    return await run(session, [AITask(list(map(_prompt, range(count))), max_tokens=_TOKENS, temperature=1.0)])


async def _time_singles(session: Session, count: int) -> float:
    tasks = [AITask(_prompt(number), max_tokens=_TOKENS, temperature=1.0, seed=number) for number in range(count)]
    return await run(session, tasks)


async def _time_batches(client: httpx2.AsyncClient, count: int) -> float:
    began = time.perf_counter()
    for start in range(0, count, _BATCH):
        numbers = range(start, min(count, start + _BATCH))
        await _post(client, "chat/completions/batch", messages=[_messages(number) for number in numbers])
    return time.perf_counter() - began


async def _time_requests(client: httpx2.AsyncClient, count: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(
        *(_post(client, "chat/completions", messages=_messages(number), seed=number) for number in range(count))
    )
    return time.perf_counter() - began


async def _post(client: httpx2.AsyncClient, path: str, **body: Any) -> None:
    answer = await client.post(path, json={"max_tokens": _TOKENS, "temperature": 1.0, **body})
    if answer.is_error:
        raise RhapsodyError(f"the server itself answered with {answer.status_code}: {answer.text[:500]}")
    answer.json()


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": _prompt(number)}]
