"""Runs the commands of a scheduler, within a time limit."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import PIPE
from collections.abc import Mapping, Sequence
from contextlib import suppress

import anyio
import msgspec

from rhapsody_mcp.model.errors import SchedulerUnavailable

__all__ = ["CommandResult", "run_command"]


_END_S = 5  # for the pipes of a killed command to close


class CommandResult(msgspec.Struct, frozen=True):
    """What a command that ended has left."""

    exit_code: int
    stdout: str
    stderr: str


async def run_command(
    arguments: Sequence[str], environment: Mapping[str, str], *, stdin: str = "", within_s: float, name: str = ""
) -> CommandResult:
    """Run a command to its end. Its processes end with this call, also where the call is canceled.

    Raises SchedulerUnavailable where the command is not installed, or takes longer than `within_s`; the error calls the
    command `name`, by default its first argument.
    """
    name = name or arguments[0]
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *arguments, env=dict(environment), stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    )
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:  # asyncio would end the process without its children
        with anyio.CancelScope(shield=True):
            await _end(await starting)
        raise
    except OSError as error:
        raise SchedulerUnavailable(f"{name} could not be started: {error}.") from error
    try:
        async with asyncio.timeout(within_s):
            stdout, stderr = await process.communicate(stdin.encode())
    except TimeoutError:
        raise SchedulerUnavailable(
            f"{name} gave no answer within {within_s:g} s: the scheduler is busy or down. Try again later."
        ) from None
    finally:
        await _end(process)
    assert process.returncode is not None, "communicate has waited"
    return CommandResult(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and its children, which are in its process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        with anyio.move_on_after(_END_S, shield=True):
            await process.communicate()
    finally:
        process._transport.close()  # type: ignore[attr-defined]  # where another process holds its pipes
