"""Ends what a crash of an earlier service left of its engines: those that the ledger names, and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rhapsody_mcp.engine.process.cleanup import end_remains
from rhapsody_mcp.engine.process.liveness import Stalls
from rhapsody_mcp.engine.process.run_dirs import is_folder, remove, taken_over
from rhapsody_mcp.engine.process.tree import end, living, started_at, with_arguments
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import DropEngine, EngineRow

__all__ = ["end_orphans"]

_KEEPER_GRACE_S = 15.0  # a keeper that has lost its owner stops its engine in so long, and leaves nothing
_LOCK_WAIT_S = 2.0
_POLL_S = 0.1


async def end_orphans(ledger: Ledger) -> list[str]:
    """End every engine of the ledger whose owner is gone, and take its row out; a sentence for each that had left
    processes. Takes up to 20 s where a keeper is about to end by itself: run it beside other work.

    Engines that have an owner, such as new ones of this process, are left alone.
    """
    by_folder: dict[str, list[EngineRow]] = {}
    for row in await ledger.engines():
        by_folder.setdefault(row.folder, []).append(row)
    sentences_by_folder = await asyncio.gather(
        *(_end_folder(ledger, Path(folder), rows) for folder, rows in by_folder.items())
    )
    return [sentence for sentences in sentences_by_folder for sentence in sentences]


async def _end_folder(ledger: Ledger, folder: Path, rows: list[EngineRow]) -> list[str]:
    """The engines of one folder have one owner."""
    if not is_folder(folder):
        return await _end_engines(ledger, rows, folder=None)
    for _ in range(round(_LOCK_WAIT_S / _POLL_S)):
        with taken_over(folder) as is_taken_over:
            if is_taken_over or not (folder / "lock").exists():
                return await _end_engines(ledger, rows, folder)
        await asyncio.sleep(_POLL_S)  # its owner lives, or it is being swept
    return []


async def _end_engines(ledger: Ledger, rows: list[EngineRow], folder: Path | None) -> list[str]:
    """Wait for the keepers, then end what is left."""
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
    """Give the keeper its time, unless somebody has stopped it, then kill it; which were killed."""
    stalls, polls_left = Stalls(), round(_KEEPER_GRACE_S / _POLL_S)
    while keepers := await asyncio.to_thread(_keepers, row):
        if stalls.look(keepers) or not (polls_left := polls_left - 1):
            break
        await asyncio.sleep(_POLL_S)
    await asyncio.to_thread(end, lambda: living(keepers))
    return keepers


def _keepers(row: EngineRow) -> set[int]:
    """This engine's keeper, if it lives: by its arguments, and by pid and start time where these were written down."""
    pids = set(with_arguments("rhapsody_mcp.engine.keeper", "--mark", row.mark)) if row.mark else set()
    if not row.started:
        return pids
    return {pid for pid in pids if pid == row.pid and started_at(pid) == row.started}
