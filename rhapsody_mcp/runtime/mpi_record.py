"""Remembers whether MPI worked when a job last tried it on this machine."""

from __future__ import annotations

from rhapsody_mcp.engine.node.mpi_hint import MPI_REFUSED, mpi_remedies
from rhapsody_mcp.machine import Machine
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ComputeTask, Task, name_of

__all__ = ["MpiRecord"]


class MpiRecord:
    """What came of the last MPI job that ran or was refused on this machine."""

    def __init__(self) -> None:
        self._text = ""

    def told(self, machine: Machine) -> str:
        """A sentence without its full stop; before the first job, what is known of the machine."""
        if self._text:
            return self._text
        if not machine.dragon.present:
            return "MPI jobs do not run here: they need Dragon"
        if not machine.pmi:
            return f"MPI jobs do not run here: no PMIx or Cray PMI library was found. {mpi_remedies().rstrip('.')}"
        return f"MPI jobs may run here, on dragon: {machine.pmi} is here, and the first one tries whether it works"

    def heed(self, opened: OpenSession, task: Task) -> None:
        """Note what came of the task, if it was an MPI job that has ended on one node."""
        if task.outcome is None or not isinstance(task, ComputeTask) or task.layout.pmi != "auto":
            return
        if not opened.config.needs_allocation and not task.outcome.nodes:
            self._note(f"{name_of(task)} of {opened.id}", task.layout.ranks, task.outcome)

    def _note(self, job: str, ranks: int, outcome: Outcome) -> None:
        if outcome.state is TaskState.DONE:
            self._text = f"MPI jobs run here, on dragon: {job} did, with {ranks} ranks"
        elif outcome.error.startswith(MPI_REFUSED):
            self._text = f"MPI jobs did not run here when {job} tried: {outcome.error.rstrip('.')}"
