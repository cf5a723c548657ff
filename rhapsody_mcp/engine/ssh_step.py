"""Runs a command as long as its standard input stays open: the part of `ssh_launcher` on each host.

    python -m rhapsody_mcp.engine.ssh_step

The first line of the standard input is an `SshStep` as JSON. At the end of the input, also because the connection was
lost, the command gets TERM, and after a while KILL. This program ends with the exit code of the command, once no
process of the command is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

from rhapsody_mcp.engine.process.tree import adopt_orphans, child_ends_first, end, own_descendants

__all__ = ["main"]

_GRACE_S = 20.0


def main() -> int:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    step = json.loads(sys.stdin.buffer.readline() or "null")
    if step is None:
        return 1
    adopt_orphans()
    command = subprocess.Popen(
        step["command"], env=step["environment"], stdin=subprocess.DEVNULL, cwd="/", process_group=0
    )
    if not child_ends_first(command.pid, sys.stdin.fileno()):
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            command.wait(_GRACE_S)
        command.kill()
    code = command.wait()
    end(own_descendants)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
