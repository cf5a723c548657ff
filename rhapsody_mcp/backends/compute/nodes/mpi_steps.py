"""Starts the ranks of MPI jobs on several nodes, each job by a step of Slurm."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rhapsody_mcp.backends.base import EngineBook
from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.nodes.steps import SHARING, has_srun
from rhapsody_mcp.backends.engine_process import KeeperHandle, last_lines
from rhapsody_mcp.model.errors import RhapsodyError, SchedulerUnavailable
from rhapsody_mcp.schedulers.commands import run_command

__all__ = ["MpiSteps"]

_KINDS = ("pmix", "cray_shasta")
"""The interfaces by which srun connects ranks, in the order of trial. With others, and with none, each rank of an MPI
library that does not know them is alone, of a world of size 1, without an error."""
_LIST_S = 20.0
_LOG_LINES = 5


class _Choice(NamedTuple):
    """The value of srun's option --mpi; empty where none works, with the reason."""

    kind: str
    problem: str


class MpiSteps:
    """Runs srun under a keeper, so that a step ends with its owner.

    `ended` is called with the uid of a task when its step has ended, and with the reason where the step has failed.
    """

    def __init__(
        self,
        folder: Path,
        environment: Callable[[], Mapping[str, str]],
        book: EngineBook | None,
        ended: Callable[[str, str], None],
    ) -> None:
        self._folder, self._environment, self._book, self._ended = folder, environment, book, ended
        self._choice: asyncio.Task[_Choice] | None = None
        self._steps: dict[str, asyncio.Task[None]] = {}

    def run(self, uid: str, ranks: Sequence[tuple[Node, str]]) -> None:
        """Start a script for each rank, on the rank's node; a script becomes the rank."""
        step = self._steps[uid] = asyncio.create_task(self._run(uid, [(node.name, script) for node, script in ranks]))
        step.add_done_callback(lambda _: self._steps.pop(uid, None))

    async def close(self) -> None:
        """End all steps."""
        for step in self._steps.values():
            step.cancel()
        await asyncio.gather(*self._steps.values(), return_exceptions=True)

    async def _run(self, uid: str, ranks: Sequence[tuple[str, str]]) -> None:
        self._choice = self._choice or asyncio.create_task(_choose(self._environment()))
        choice = await asyncio.shield(self._choice)
        try:
            problem = choice.problem or await self._run_step(choice.kind, ranks)
        except (OSError, RhapsodyError) as error:  # no room for its files, or the ledger cannot be written
            problem = f"its step could not be started: {error}"
        self._ended(uid, problem)

    async def _run_step(self, kind: str, ranks: Sequence[tuple[str, str]]) -> str:
        """Run a step to its end; return why it failed, an empty text where it did not."""
        mark = secrets.token_hex(8)
        hosts, programs, log = (self._folder / f"{mark}.{suffix}" for suffix in ("hosts", "ranks", "log"))
        hosts.write_text("".join(f"{node}\n" for node, _ in ranks))
        programs.write_text("".join(f"{rank} /bin/sh {script}\n" for rank, (_, script) in enumerate(ranks)))
        nodes = len({node for node, _ in ranks})
        command = ["srun", f"--nodes={nodes}", f"--ntasks={len(ranks)}", f"--mpi={kind}", "--distribution=arbitrary"]
        keeper = KeeperHandle(mark, "mpi step", self._folder, self._book)
        await keeper.start(
            ["--name", "mpi-step", "--log", str(log), "--stop", "term"],
            [*command, *SHARING, "--overcommit", "--multi-prog", str(programs)],
            {**self._environment(), "SLURM_HOSTFILE": str(hosts)},
        )
        try:
            code = await keeper.wait()
        except asyncio.CancelledError:
            keeper.stop_engine()
            await keeper.wait()
            raise
        words = last_lines(log, _LOG_LINES)
        for file in (hosts, programs, log):
            file.unlink(missing_ok=True)
        return f"srun ended with exit code {code}{f': {words}' if words else ''}" if code else ""


async def _choose(environment: Mapping[str, str]) -> _Choice:
    """Choose the first interface that this Slurm offers."""
    if not has_srun():
        return _Choice(
            "",
            "MPI over nodes needs a job of Slurm, and these nodes are reached by ssh. Leave mpi out: the ranks then "
            "run as independent processes",
        )
    try:
        answer = await run_command(["srun", "--mpi=list"], environment, within_s=_LIST_S)
    except SchedulerUnavailable as error:
        return _Choice("", f"MPI over nodes needs Slurm's srun: {error}")
    listing = answer.stdout + answer.stderr  # by version of Slurm, the list is in one or the other
    offered = [kind for kind in _KINDS if kind in listing.split()]
    if offered:
        return _Choice(offered[0], "")
    return _Choice(
        "",
        f"MPI over nodes needs one of {', '.join(_KINDS)} in Slurm, and `srun --mpi=list` says: "
        f"{' '.join(listing.split()) or 'nothing'}. Run the job on one node, or ask the site for Slurm's PMIx plugin.",
    )
