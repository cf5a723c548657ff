"""Holds answers to their JSON schema in a process of its own: how long that takes, the agent and the model decide."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import BinaryIO

import msgspec

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.json_schemas import SchemaMismatch, read_answer

__all__ = ["AnswerChecks", "Misfit"]

_MOST_CPU_S = 5.0
_LENGTH_BYTES = 8


class Misfit(msgspec.Struct, frozen=True):
    """The first of some answers that does not fit, and why."""

    index: int
    problem: str


class _Asked(msgspec.Struct, frozen=True):
    schema: bytes
    texts: list[str]


class AnswerChecks:
    """Its process starts with the first check and ends at `close`, or when this process does."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def first_misfit(self, schema: bytes, texts: Sequence[str]) -> Misfit | None:
        """Raises InvalidTask where checking one of them takes more than 5 s of a core."""
        asked = msgspec.msgpack.encode(_Asked(schema, list(texts)))
        async with self._turn:
            try:
                return msgspec.msgpack.decode(await self._exchange(asked), type=Misfit | None)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                await self._end()
                raise InvalidTask(
                    f"json_schema cannot be checked against the answer within {_MOST_CPU_S:g} s of a core. Make it "
                    "simpler: fewer parts under allOf, anyOf and oneOf, and fewer definitions that refer to each other."
                ) from error
            except BaseException:  # canceled halfway: what it still says belongs to nobody
                await asyncio.shield(self._end())
                raise

    async def _exchange(self, asked: bytes) -> bytes:
        process = await self._started()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        process.stdin.write(len(asked).to_bytes(_LENGTH_BYTES) + asked)
        await process.stdin.drain()
        length = int.from_bytes(await process.stdout.readexactly(_LENGTH_BYTES))
        return await process.stdout.readexactly(length)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-P", "-m", __name__],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is not for it
            )
        return self._process

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def _serve(asked: BinaryIO, answered: BinaryIO) -> None:
    """Check what comes until no more does. The timer ends this process, whatever it is in: no handler is called."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while length := asked.read(_LENGTH_BYTES):
        question = msgspec.msgpack.decode(asked.read(int.from_bytes(length)), type=_Asked)
        encoded = msgspec.msgpack.encode(_first_misfit(question))
        answered.write(len(encoded).to_bytes(_LENGTH_BYTES) + encoded)
        answered.flush()


def _first_misfit(question: _Asked) -> Misfit | None:
    for index, text in enumerate(question.texts):
        signal.setitimer(signal.ITIMER_PROF, _MOST_CPU_S)
        try:
            read_answer(text, question.schema)
        except SchemaMismatch as unfit:
            return Misfit(index, str(unfit))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return None


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
