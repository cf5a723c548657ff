"""Checks answers against their JSON schema, in a separate process because some schemas take very long to check."""

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

__all__ = ["AnswerChecker", "Mismatch"]

_MAX_CPU_S = 5.0
_LENGTH_BYTES = 8


class Mismatch(msgspec.Struct, frozen=True):
    """The index of the first answer that does not fit its schema, and the reason."""

    index: int
    problem: str


class _CheckRequest(msgspec.Struct, frozen=True):
    schema: bytes
    texts: list[str]


class AnswerChecker:
    """Checks answers in one process, which starts with the first check, and ends at `close` or with this process."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def first_mismatch(self, schema: bytes, texts: Sequence[str]) -> Mismatch | None:
        """The first of `texts` that does not fit the schema; None where all fit.

        Raises InvalidTask where the check of one text takes more than 5 s of a core.
        """
        request = msgspec.msgpack.encode(_CheckRequest(schema, list(texts)))
        async with self._lock:
            try:
                return msgspec.msgpack.decode(await self._exchange(request), type=Mismatch | None)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                await self._end()
                raise InvalidTask(
                    f"json_schema cannot be checked against the answer within {_MAX_CPU_S:g} s of a core. Make it "
                    "simpler: fewer parts under allOf, anyOf and oneOf, and fewer definitions that refer to each other."
                ) from error
            except BaseException:  # canceled halfway: nobody would read the reply
                await asyncio.shield(self._end())
                raise

    async def _exchange(self, request: bytes) -> bytes:
        process = await self._running_process()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        process.stdin.write(len(request).to_bytes(_LENGTH_BYTES) + request)
        await process.stdin.drain()
        length = int.from_bytes(await process.stdout.readexactly(_LENGTH_BYTES))
        return await process.stdout.readexactly(length)

    async def _running_process(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-P", "-m", __name__],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # so Ctrl-C in a terminal does not reach the process
            )
        return self._process

    async def close(self) -> None:
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the input ends. SIGPROF has no handler: its timer ends the process even in C code."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    while length := requests.read(_LENGTH_BYTES):
        check_request = msgspec.msgpack.decode(requests.read(int.from_bytes(length)), type=_CheckRequest)
        encoded = msgspec.msgpack.encode(_first_mismatch(check_request))
        replies.write(len(encoded).to_bytes(_LENGTH_BYTES) + encoded)
        replies.flush()


def _first_mismatch(check_request: _CheckRequest) -> Mismatch | None:
    for index, text in enumerate(check_request.texts):
        signal.setitimer(signal.ITIMER_PROF, _MAX_CPU_S)
        try:
            read_answer(text, check_request.schema)
        except SchemaMismatch as unfit:
            return Mismatch(index, str(unfit))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return None


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
