"""An allocation is requested and given back once, also where the scheduler does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection
from pathlib import Path
from typing import cast

import pytest

from rhapsody_mcp.backends.base import Returned, Running
from rhapsody_mcp.backends.pilot import submission
from rhapsody_mcp.backends.pilot.allocation import Allocation
from rhapsody_mcp.backends.pilot.allocation_user import AllocationUser
from rhapsody_mcp.backends.pilot.messages import Events, Progress
from rhapsody_mcp.backends.pilot.node_time import AllocationHistory
from rhapsody_mcp.backends.pilot.saved_events import has_events, save_events
from rhapsody_mcp.backends.pilot.submission import AllocationRecord, has_allocation
from rhapsody_mcp.model.errors import BackendUnavailable, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState, JobStatus, Partition, Scheduler, Verdict
from rhapsody_mcp.testing import ScriptedBackend
from tests.processes import wait_until

pytestmark = pytest.mark.anyio


class Waiting(Scheduler):
    """A scheduler whose jobs stay pending. The first `unanswered` cancellations get no answer; the others wait for
    `may_cancel`."""

    name = "waiting"

    def __init__(self, unanswered: int = 0) -> None:
        self.unanswered, self.submitted = unanswered, 0
        self.canceled: list[str] = []
        self.may_cancel = asyncio.Event()
        self.states: dict[str, JobState] = {}

    async def version(self) -> str:
        return "1"

    async def submit(self, request: AllocationRequest, script: str, log: Path) -> str:
        self.submitted += 1
        return str(self.submitted)

    async def check(self, request: AllocationRequest, script: str) -> Verdict:
        raise NotImplementedError

    async def status(self, job_ids: Collection[str]) -> dict[str, JobStatus]:
        return {job: JobStatus(state=self.states.get(job, JobState.PENDING)) for job in job_ids}

    async def find_jobs(self, job_name: str) -> list[str]:
        return []

    async def cancel(self, job_id: str) -> None:
        if self.unanswered:
            self.unanswered -= 1
            raise SchedulerUnavailable("no answer")
        await self.may_cancel.wait()
        self.canceled.append(job_id)

    async def partitions(self) -> list[Partition]:
        return []


def made(scheduler: Scheduler, folder: Path) -> tuple[Allocation, AllocationUser]:
    """An allocation, and a backend that can ask for it."""
    allocation = Allocation(AllocationRequest(nodes=1, minutes=1), scheduler, [])
    allocation.keep_in(folder)
    return allocation, cast(AllocationUser, ScriptedBackend(lambda *_: None))


async def test_a_job_that_cannot_be_canceled_at_once_is_canceled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_AGAIN_S", 0.01)
    scheduler = Waiting(unanswered=2)
    scheduler.may_cancel.set()
    allocation, user = made(scheduler, tmp_path)
    start = asyncio.create_task(allocation.acquire(user))
    await wait_until(lambda: allocation.job == "1", 10)
    await allocation.leave(user)
    assert (scheduler.canceled, scheduler.unanswered) == (["1"], 0)
    assert not allocation.job and not has_allocation(tmp_path)
    assert isinstance((await asyncio.gather(start, return_exceptions=True))[0], asyncio.CancelledError)


async def test_a_start_waits_until_the_job_before_is_given_back(tmp_path: Path) -> None:
    scheduler = Waiting()
    allocation, user = made(scheduler, tmp_path)
    start = asyncio.create_task(allocation.acquire(user))
    await wait_until(lambda: allocation.job == "1", 10)
    release = asyncio.create_task(allocation.leave(user))
    await asyncio.gather(start, return_exceptions=True)
    again = asyncio.create_task(allocation.acquire(user))
    for _ in range(10):  # turns of the loop, more than a submission needs
        await asyncio.sleep(0)
    assert scheduler.submitted == 1
    scheduler.may_cancel.set()
    await release
    await wait_until(lambda: allocation.job == "2", 10)
    await allocation.leave(user)
    assert scheduler.canceled == ["1", "2"]
    await asyncio.gather(again, return_exceptions=True)


@pytest.mark.parametrize("is_given_back", [False, True])
async def test_a_job_that_had_a_pilot_counts_unless_it_is_given_back(tmp_path: Path, is_given_back: bool) -> None:
    AllocationRecord("", 0, "rhapsody-x", "7", minutes=10, had_pilot=True).save(tmp_path)
    scheduler = Waiting()
    scheduler.may_cancel.set()
    scheduler.states["7"] = JobState.RUNNING if is_given_back else JobState.ENDED
    allocation, user = made(scheduler, tmp_path)
    start = asyncio.create_task(allocation.acquire(user))
    if is_given_back:
        await wait_until(lambda: allocation.status is not None, 10)
        await allocation.leave(user)
    await asyncio.gather(start, return_exceptions=True)
    assert [job.counts for job in AllocationHistory().jobs(tmp_path)] == [not is_given_back]


async def test_a_job_that_cannot_be_canceled_is_kept_for_the_next_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_CANCEL_S", 0.0)
    monkeypatch.setattr(submission, "_AGAIN_S", 0.01)
    allocation, user = made(Waiting(unanswered=1000), tmp_path)
    start = asyncio.create_task(allocation.acquire(user))
    await wait_until(lambda: allocation.job == "1", 10)
    with pytest.raises(BackendUnavailable, match="job 1 could not be canceled, and may go on: no answer"):
        await allocation.leave(user)
    assert has_allocation(tmp_path)
    allocation.detach()
    await asyncio.gather(start, return_exceptions=True)


async def test_events_that_a_service_has_not_recorded_are_for_the_next_one(tmp_path: Path) -> None:
    first, second = (Events("scripted", [Running(uid, 1.0)], [1]) for uid in "ab")
    save_events(tmp_path, "1", [first, Progress("scripted", "ready")])
    save_events(tmp_path, "2", [second])
    save_events(tmp_path, "3", [Events("scripted", [Returned("c", "the end")], [1])])
    scheduler, received, recorded = Waiting(), list[object](), asyncio.Event()

    class User:
        name = "scripted"

        def receive(self, message: object) -> Awaitable[None]:
            received.append(message)
            return asyncio.ensure_future(self._recorded())

        def lose(self, *_: object) -> None: ...

        async def _recorded(self) -> None:
            await recorded.wait()

    allocation, _ = made(scheduler, tmp_path)
    user = cast(AllocationUser, User())
    allocation.users["scripted"] = user
    await allocation.acquire(user)
    assert (allocation.is_over, received, scheduler.submitted) == (True, [first, second], 0)
    assert has_events(tmp_path)
    recorded.set()
    await wait_until(lambda: not has_events(tmp_path), 10)
