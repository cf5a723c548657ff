"""Ends the processes of engines that a crashed service has left: only engines that the ledger names."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rhapsody_mcp.engine.process.cleanup import end_remains
from rhapsody_mcp.engine.process.liveness import StopDetector
from rhapsody_mcp.engine.process.run_dirs import is_run_dir, remove, take_over
from rhapsody_mcp.engine.process.tree import end, living, processes_with_arguments, started_at
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import DropEngine, EngineRow

__all__ = ["end_orphans"]

_KEEPER_GRACE_S = 15.0  # a keeper that has lost its owner ends its engine within this time
_LOCK_WAIT_S = 2.0
_POLL_S = 0.1


async def end_orphans(ledger: Ledger) -> list[str]:
    """End every engine of the ledger whose owner has died, and delete its row.

    Returns a sentence for each folder in which processes were ended. Takes up to 20 s where a keeper is about to end by
    itself. Engines whose owner lives, such as those of this process, stay.
    """
    by_folder: dict[str, list[EngineRow]] = {}
    for row in await ledger.engines():
        by_folder.setdefault(row.folder, []).append(row)
    sentences_by_folder = await asyncio.gather(
        *(_end_folder(ledger, Path(folder), rows) for folder, rows in by_folder.items())
    )
    return [sentence for sentences in sentences_by_folder for sentence in sentences]


async def _end_folder(ledger: Ledger, folder: Path, rows: list[EngineRow]) -> list[str]:
    """End the engines of one folder, which have one owner."""
    if not is_run_dir(folder):
        return await _end_engines(ledger, rows, folder=None)
    for _ in range(round(_LOCK_WAIT_S / _POLL_S)):
        with take_over(folder) as is_taken_over:
            if is_taken_over or not (folder / "lock").exists():
                return await _end_engines(ledger, rows, folder)
        await asyncio.sleep(_POLL_S)  # the owner lives, or another process cleans the folder
    return []


async def _end_engines(ledger: Ledger, rows: list[EngineRow], folder: Path | None) -> list[str]:
    """Wait for the keepers, then end the remaining processes and delete the folder."""
    killed = set[int]().union(*await asyncio.gather(*map(_end_keeper, rows)))
    marks = [row.mark for row in rows if row.mark]
    if folder is None:
        ended = await asyncio.to_thread(end_remains, None, marks)
    else:
        ended = await asyncio.to_thread(remove, folder, marks)
    ledger.write(*(DropEngine(row.mark) for row in rows))
    pids = sorted({*ended, *killed})
    engines = ", ".join(f"the {row.kind} engine of session {row.session}" for row in rows)
    return [f"an earlier service had left {engines}; ended: processes {', '.join(map(str, pids))}"] if pids else []


async def _end_keeper(row: EngineRow) -> set[int]:
    """Wait for the end of the keeper, not for a stopped one, then kill it. Returns the pids that were killed."""
    stop_detector, polls_left = StopDetector(), round(_KEEPER_GRACE_S / _POLL_S)
    while keepers := await asyncio.to_thread(_keepers, row):
        if stop_detector.check(keepers) or not (polls_left := polls_left - 1):
            break
        await asyncio.sleep(_POLL_S)
    await asyncio.to_thread(end, lambda: living(keepers))
    return keepers


def _keepers(row: EngineRow) -> set[int]:
    """The pid of the engine's keeper, if it lives: found by its arguments, and by pid and start time where known."""
    pids = set(processes_with_arguments("rhapsody_mcp.engine.keeper", "--mark", row.mark)) if row.mark else set()
    if not row.started:
        return pids
    return {pid for pid in pids if pid == row.pid and started_at(pid) == row.started}
