"""What a backend does where its engine does not start at once."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import Cause
from tests.processes import family

pytestmark = pytest.mark.anyio

HANGS = "import signal; signal.pause()"
STAYS = "import os; os.read(os.open(os.environ['RHAPSODY_LIFELINE'], os.O_RDONLY), 1)"
GIVES_UP = f"print('+++ no luck\\nwarning: 2 leftover files in /dev/shm: \\nDD0968log_0D\\n_41M', flush=True); {STAYS}"
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


def answer() -> str:
    return "ran"


@pytest.mark.parametrize(
    ("mood", "limits_s", "told"),
    [
        (HANGS, (1.0, 60.0), "starting again, the first start took more than 1 s"),
        (GIVES_UP, (60.0, 60.0), "starting again, the first start failed"),
        (ENDS, (60.0, 60.0), "starting again, the first start failed"),
    ],
    ids=["it hangs", "it gives up and stays", "it ends"],
)
async def test_an_engine_that_does_not_start_is_started_again_and_its_tasks_run(
    mood: str, limits_s: tuple[float, float], told: str
) -> None:
    mark, said, task = uuid.uuid4().hex, list[tuple[object, TaskState]](), ComputeTask(answer)

    class Watched(Moody):
        def __setattr__(self, field: str, value: object) -> None:
            super().__setattr__(field, value)
            said.append((value, task.state))

    async with Session([Watched(f"{mood} # {mark}", limits_s=limits_s)]) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=600)
        assert task.return_value == "ran"
        assert (told, TaskState.QUEUED) in said
        assert not family(mark)


async def test_an_engine_that_fails_twice_loses_its_tasks_in_words_and_the_next_submission_starts_it_anew() -> None:
    first, second = ComputeTask(answer), ComputeTask(answer)
    async with Session([Moody(ENDS, GIVES_UP, limits_s=(60.0, 60.0))]) as session:
        await session.submit_tasks([first])
        await session.wait_tasks([first], timeout=600)
        assert (first.state, first.cause) == (TaskState.FAILED, Cause.LOST)
        told = str(first.exception)
        assert "gave up its start: +++ no luck. Try again: tasks that are submitted again, under the same names" in told
        assert "DD0968" not in told and "_41M" not in told
        await session.submit_tasks([second])
        await session.wait_tasks([second], timeout=600)
        assert second.return_value == "ran"


async def test_a_host_that_ends_while_what_placed_it_stays_does_not_hold_its_tasks_for_ever() -> None:
    class Stays(LocalExecutionBackend):
        def _host_command(self, config: Path) -> list[str]:
            stays = 'exec 3<"$RHAPSODY_LIFELINE"; "$@"; exec cat <&3'
            return ["/bin/sh", "-c", stays, "sh", *super()._host_command(config)]

    def end_the_host() -> None:
        import os
        import signal

        status = {line.split(":")[0]: line.split() for line in open(f"/proc/{os.getppid()}/status")}
        os.kill(int(status["PPid"][1]), signal.SIGKILL)
        signal.pause()

    task = ComputeTask(end_the_host)
    async with Session([Stays(num_workers=1)]) as session:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=600)
        assert (task.state, task.cause) == (TaskState.FAILED, Cause.LOST)
        again = ComputeTask(answer)
        await session.submit_tasks([again])
        await session.wait_tasks([again], timeout=600)
        assert again.return_value == "ran"
