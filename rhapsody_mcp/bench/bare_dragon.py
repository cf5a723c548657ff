"""Starts Dragon's own processes and process groups on request, without a rhapsody-mcp engine.

dragon -s python -m rhapsody_mcp.bench.bare_dragon SOCKET
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

from rhapsody_mcp.engine.transport import Link

__all__ = ["Timing"]

Timing = tuple[float, str]
"""The seconds, and an error text, which is empty on success."""


def main() -> None:
    backend: Link[tuple[str, int]] = Link(sys.argv[1], tuple[str, int])
    with suppress(EOFError, ConnectionError):
        while True:
            for workload, count in backend.receive():
                backend.send(_measure(workload, count))
    os._exit(0)


def _measure(workload: str, count: int) -> Timing:
    began = time.perf_counter()
    try:
        _WORKLOADS[workload](count)
    except Exception as error:  # sent to the caller
        return 0.0, repr(error)
    return time.perf_counter() - began, ""


def _nothing(_: int) -> None:
    pass


def _processes(count: int) -> None:
    """Start all processes, and then wait for each."""
    from dragon.native.process import Process

    processes: list[Any] = [Process(**_program(Process)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.returncode == 0


def _group(ranks: int) -> None:
    from dragon.native.process import Process, ProcessTemplate
    from dragon.native.process_group import ProcessGroup

    group = ProcessGroup(restart=False, ignore_error_on_exit=True, pmi=None)
    for _ in range(ranks):
        group.add_process(1, ProcessTemplate(**_program(Process)))
    group.init()
    group.start()
    group.join()
    group.close()


def _program(process: Any) -> dict[str, Any]:
    return {"target": "true", "args": [], "stdout": process.DEVNULL, "stderr": process.DEVNULL}


_WORKLOADS = {"nothing": _nothing, "processes": _processes, "group": _group}


if __name__ == "__main__":
    main()
