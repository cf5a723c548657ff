"""The backend that runs functions and programs in processes of this machine, without Dragon: for laptops and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rhapsody_mcp.backends.compute.backend import ComputeBackend
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Caps, TaskSpec

__all__ = ["LocalExecutionBackend"]


class LocalExecutionBackend(ComputeBackend):
    """Runs the same modes of task as the Dragon backend, on this machine only, and without MPI."""

    launcher = "local"

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        name: str = "local",
        stall_s: float = 10.0,
        environment: Mapping[str, Any] | None = None,
        caps: Caps | None = None,
    ) -> None:
        """Without `num_workers` there is one worker for each core."""
        super().__init__(num_workers, name, stall_s, environment, caps)

    def check(self, spec: TaskSpec) -> None:
        super().check(spec)
        if spec.layout.pmi not in (None, "none"):
            raise InvalidTask(
                f"backend {self.name!r} runs no MPI, which needs the dragon backend: use a session that has it "
                '(create_session with backends=["dragon"]), or leave mpi out: its ranks then run as independent '
                'processes (in Python: "pmi": "none").'
            )
