"""Owns an engine that has something to do, until standard input ends:

python -m tests.engine.owner KIND LEDGER FOLDER STRAY
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from rhapsody_mcp.api import AITask, ComputeTask, Session, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3, DragonVllmInferenceBackend, LocalExecutionBackend
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import DropEngine, EngineRow, PutEngine
from tests.processes import wait_until

PROGRAM = "env -i setsid sleep 300{stray} & : >{folder}/program; wait"
"""A shell, and a sleep that has neither the engine's mark nor its session. The shell stays what it is: a process that
becomes another program has no command line for a moment."""


BACKENDS: dict[str, Callable[[], DragonExecutionBackendV3 | LocalExecutionBackend | DragonVllmInferenceBackend]] = {
    "dragon": lambda: DragonExecutionBackendV3(num_workers=1),
    "local": lambda: LocalExecutionBackend(num_workers=1),
    "vllm": lambda: DragonVllmInferenceBackend(model="shipped", device="cpu"),
}


class Book:
    """Keeps the engines of one session."""

    def __init__(self, ledger: Ledger, session: str = "s1") -> None:
        self._ledger, self._session = ledger, session
        self._rows: dict[str, EngineRow] = {}

    async def opened(self, mark: str, kind: str, folder: str) -> None:
        self._rows[mark] = EngineRow(mark, kind, self._session, 0, 0, folder)
        await self._ledger.commit(PutEngine(self._rows[mark]))

    def launched(self, mark: str, pid: int, started: int) -> None:
        row = self._rows[mark]
        self._ledger.write(PutEngine(EngineRow(mark, row.kind, row.session, pid, started, row.folder)))

    def closed(self, mark: str) -> None:
        self._ledger.write(DropEngine(mark))


def stay(up: str) -> None:
    import time
    from pathlib import Path

    Path(up).touch()
    time.sleep(300)


async def main() -> None:
    kind, folder, stray = sys.argv[1], Path(sys.argv[3]), sys.argv[4]
    ledger = Ledger(Path(sys.argv[2]))
    ledger.open()
    backend = BACKENDS[kind]()
    backend.book = Book(ledger)
    async with Session([backend], folder=folder / "results") as session:
        await (keep_it_answering(session) if kind == "vllm" else keep_it_working(session, folder, stray))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await ledger.close()


async def keep_it_working(session: Session, folder: Path, stray: str) -> None:
    """Return when a function and a program run."""
    program = PROGRAM.format(folder=folder, stray=stray)
    function = ComputeTask(stay, args=(str(folder / "function"),))
    await session.submit_tasks([function, ComputeTask(executable="/bin/sh", arguments=["-c", program])])
    await wait_until(lambda: (folder / "function").exists() and (folder / "program").exists(), 600)


async def keep_it_answering(session: Session) -> None:
    """Return when a server works on prompts."""
    prompts = AITask([f"wait for ever, {number}" for number in range(5000)], max_tokens=500)
    await session.submit_tasks([prompts])
    await wait_until(lambda: prompts.state is not TaskState.QUEUED, 600)
    assert prompts.state is TaskState.RUNNING, prompts.exception


if __name__ == "__main__":
    asyncio.run(main())
