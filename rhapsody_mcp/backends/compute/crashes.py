"""Works out the outcomes of the tasks of a worker that has exited, from start notes and output files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from rhapsody_mcp.backends.compute.in_flight import InFlightTask
from rhapsody_mcp.backends.compute.outcomes import crashed, stopped
from rhapsody_mcp.engine.messages import WorkerExited
from rhapsody_mcp.engine.task.output import move_stream
from rhapsody_mcp.engine.task.output_files import MOVE_COUNT, STREAMS
from rhapsody_mcp.engine.task.start_log import read_starts
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.values import Stream

__all__ = ["noted_starts", "outcomes_after_exit"]


async def outcomes_after_exit(
    tasks: Sequence[InFlightTask], exited: WorkerExited, output_bytes: int | None
) -> AsyncIterator[tuple[InFlightTask, Outcome]]:
    """Yield each of these tasks that had started, or was asked to stop, with its outcome; the others can run again.

    Deletes the output files of the worker at the end.
    """
    noted = await noted_starts(tasks)
    for task in tasks:
        if task.has_started(noted) or task.stop_cause is not None:
            output = await asyncio.to_thread(
                _take_output, exited.output_path, task.task_run.results_folder, output_bytes
            )
            yield task, stopped(task, output) if task.stop_cause else crashed(task, exited, output)
    await asyncio.to_thread(_remove_output, exited.output_path)


async def noted_starts(tasks: Iterable[InFlightTask]) -> set[tuple[str, int]]:
    """The starts that are noted in the results folders of these tasks, as pairs of a uid and an attempt's number."""
    return await asyncio.to_thread(_read_starts, {task.task_run.results_folder for task in tasks})


def _read_starts(folders: Iterable[str]) -> set[tuple[str, int]]:
    return {start for folder in folders for start in read_starts(folder)}


def _take_output(path: str, folder: str, output_bytes: int | None) -> tuple[Stream, Stream]:
    """Take stdout and stderr of a worker from its files; empty where an earlier task has taken them."""
    stdout, stderr = (_move_stream(f"{path}.{suffix}", folder, output_bytes) for suffix in STREAMS)
    return stdout, stderr


def _move_stream(path: str, folder: str, output_bytes: int | None) -> Stream:
    try:
        return move_stream(path, folder, output_bytes)
    except OSError:
        return Stream()


def _remove_output(path: str) -> None:
    for suffix in (*STREAMS, MOVE_COUNT):
        Path(f"{path}.{suffix}").unlink(missing_ok=True)
