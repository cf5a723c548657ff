"""Works out the outcomes of the tasks of a worker that has exited, from start notes and output files."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rhapsody_mcp.backends.compute.in_flight import InFlightTask
from rhapsody_mcp.backends.compute.outcomes import crashed, stopped
from rhapsody_mcp.engine.messages import WorkerExited
from rhapsody_mcp.engine.process.kept_output import kept_outputs
from rhapsody_mcp.engine.task.output import printed_by_ranks
from rhapsody_mcp.engine.task.start_log import read_places, read_starts
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Caps, TaskRun
from rhapsody_mcp.model.values import Stream

__all__ = ["TakeOutput", "collect_printed", "kept_output", "noted_starts", "outcomes_after_exit", "starts_in"]


TakeOutput = Callable[[str, str | None], Awaitable[tuple[Stream, Stream]]]
"""Takes what a worker had printed from its files, by their path, into a results folder: stdout and stderr. Without a
folder the files are only deleted."""


async def outcomes_after_exit(
    tasks: Sequence[InFlightTask], exited: WorkerExited, take_output: TakeOutput
) -> AsyncIterator[tuple[InFlightTask, Outcome]]:
    """Yield each of these tasks that had started, or was asked to stop, with its outcome; the others can run again."""
    noted = await noted_starts(tasks)
    for task in tasks:
        if task.has_started(noted) or task.stop_cause is not None:
            output = await take_output(exited.output_path, task.task_run.results_folder)
            yield task, stopped(task, output) if task.stop_cause else crashed(task, exited, output)
    await take_output(exited.output_path, None)


async def noted_starts(tasks: Iterable[InFlightTask]) -> set[tuple[str, int]]:
    """The starts that are noted in the results folders of these tasks, as pairs of a uid and an attempt's number."""
    return await asyncio.to_thread(starts_in, {task.task_run.results_folder for task in tasks})


def starts_in(folders: Iterable[str]) -> set[tuple[str, int]]:
    """The starts that are noted in these results folders, as pairs of a uid and an attempt's number."""
    return {start for folder in folders for start in read_starts(folder)}


def collect_printed(
    engine_folder: Path, started: Collection[tuple[str, int]], tasks: Mapping[str, InFlightTask], caps: Caps
) -> None:
    """Set for each of the `started` tasks of an engine that has ended what it had printed."""
    folders = {tasks[uid].task_run.results_folder for uid, _ in started if uid in tasks}
    places = {start: own for folder in folders for start, own in read_places(folder).items()}
    for task in list(tasks.values()):
        own = places.get((task.uid, task.task_run.attempt), ())
        paths = [str(engine_folder.parent / place) for place in own if place.startswith(f"{engine_folder.name}/")]
        task.printed = printed_by_ranks(task.uid, paths, task.task_run.results_folder, caps.output_bytes)


def kept_output(task_runs: Iterable[TaskRun]) -> Iterator[tuple[RankOutcome, ...]]:
    """Yield, for each of these tasks, what its ranks had printed whose engine has ended without its owner."""
    kept_in = functools.cache(kept_outputs)
    for task_run in task_runs:
        uid, folder = task_run.spec.uid, task_run.results_folder
        kept = kept_in(folder).get((uid, task_run.attempt))
        yield () if kept is None else printed_by_ranks(uid, kept.paths, folder, kept.limit)
