"""Runs a command once on each of several hosts, by ssh, with the environment of this process.

    python -m rhapsody_mcp.engine.ssh_launcher HOST,HOST... COMMAND...

The same interpreter must be on all hosts. Command and environment go to the hosts over standard input, because the
environment may hold keys, and a command line can be read by every user. What the hosts write goes to stderr, with the
name of the host before each line. The exit code is the highest of all hosts, 255 where a host could not be reached.
Upon TERM, and when the parent of this process ends, the command is ended on all hosts.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Sequence
from contextlib import suppress

from rhapsody_mcp.engine.node.hardware import is_host
from rhapsody_mcp.schedulers.ssh import ssh_command

__all__ = ["main"]

_END_S = 25.0
"""How long the command may take to end on a host, in seconds."""
_LINE_BYTES = 2**20


def main() -> int:
    return asyncio.run(_run(sys.argv[1].split(","), sys.argv[2:]))


async def _run(hosts: Sequence[str], command: Sequence[str]) -> int:
    step = json.dumps({"command": command, "environment": dict(os.environ)}).encode() + b"\n"
    ended = _end_event()
    return max(await asyncio.gather(*(_run_on(host, step, ended) for host in hosts)))


def _end_event() -> asyncio.Event:
    """An event that is set by a signal, or by the end of the parent."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    if sys.platform == "linux":
        parent = os.pidfd_open(os.getppid())
        loop.add_reader(parent, _end_once, parent, ended)
    return ended


def _end_once(parent: int, ended: asyncio.Event) -> None:
    asyncio.get_running_loop().remove_reader(parent)
    ended.set()


async def _run_on(host: str, step: bytes, ended: asyncio.Event) -> int:
    program = [sys.executable, "-P", "-m", "rhapsody_mcp.engine.ssh_step"]
    if not is_host(host, socket.gethostname()):
        program = ssh_command(host, shlex.join(program))
    process = await asyncio.create_subprocess_exec(
        *program, stdin=PIPE, stdout=PIPE, stderr=STDOUT, limit=_LINE_BYTES, process_group=0
    )
    assert process.stdin is not None and process.stdout is not None, "pipes were asked for"
    process.stdin.write(step)
    ending = asyncio.create_task(_end(process, process.stdin, ended))
    await _copy(host, process.stdout)
    code = await process.wait()
    ending.cancel()
    return code if code >= 0 else 128 - code


async def _end(process: asyncio.subprocess.Process, stdin: asyncio.StreamWriter, ended: asyncio.Event) -> None:
    await ended.wait()
    stdin.close()
    await asyncio.sleep(_END_S)
    process.kill()


async def _copy(host: str, output: asyncio.StreamReader) -> None:
    at_end = False
    while not at_end:
        with suppress(ValueError):  # a line that is too long is left out
            line = await output.readline()
            at_end = not line
            if line.strip():
                sys.stderr.write(f"{host}: {line.decode(errors='replace').rstrip()}\n")
                sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
