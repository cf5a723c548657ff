"""What a backend does where its engine does not start at once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.engine.processes import descendants
from rhapsody_mcp.model.errors import BackendUnavailable
from rhapsody_mcp.model.states import Cause

pytestmark = pytest.mark.anyio

HANGS = "import signal; signal.pause()"
GIVES_UP = f"print('+++ no luck\\nwarning: 2 leftover files in /dev/shm: \\nDD0968log_0D\\n_41M', flush=True); {HANGS}"
ENDS = "print('+++ no luck'); raise SystemExit(3)"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Moody(LocalExecutionBackend):
    """Its first engines are these programs; those after them are real."""

    def __init__(self, *moods: str, limits_s: tuple[float, float]) -> None:
        super().__init__(num_workers=1)
        self.moods, self.start_limits_s = list(moods), limits_s

    def _host_command(self, config: Path) -> list[str]:
        return [sys.executable, "-c", self.moods.pop(0)] if self.moods else super()._host_command(config)


def name() -> str:
    return "ran"


@pytest.mark.parametrize(
    ("mood", "limits_s", "told"),
    [
        (HANGS, (0.5, 60.0), "starting again, the first start took more than 0 s"),
        (GIVES_UP, (60.0, 60.0), "starting again, the first start failed"),
        (ENDS, (60.0, 60.0), "starting again, the first start failed"),
    ],
    ids=["it hangs", "it gives up and stays", "it ends"],
)
async def test_an_engine_that_does_not_start_is_started_again_and_its_tasks_run(
    mood: str, limits_s: tuple[float, float], told: str
) -> None:
    before = set(descendants(1))
    said: list[tuple[str, TaskState]] = []

    class Watched(Moody):
        def __setattr__(self, field: str, value: object) -> None:
            super().__setattr__(field, value)
            if field == "progress":
                said.append((str(value), task.state))

    task = ComputeTask(name)
    async with Session([Watched(mood, limits_s=limits_s)]) as session:
        await session.submit_tasks([task])
        assert await task == "ran"
    assert (told, TaskState.QUEUED) in said
    assert set(descendants(1)) <= before
