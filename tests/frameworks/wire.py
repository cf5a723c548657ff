"""Writes down what passes between a client and a server: `python -m tests.frameworks.wire LOG COMMAND...`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import IO


def main(log_path: str, *command: str) -> int:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        threading.Thread(target=_copy, args=(sys.stdin.buffer, server.stdin, log), daemon=True).start()
        _copy(server.stdout, sys.stdout.buffer, log)
        return server.wait()


def _copy(source: IO[bytes], target: IO[bytes], log: int) -> None:
    for line in source:
        os.write(log, line)
        target.write(line)
        target.flush()
    target.close()


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # the thread may still wait for the client
