"""Submits the job of an allocation once, whatever dies meanwhile, and finds the job again."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.backends.pilot.private_files import write_private
from rhapsody_mcp.model.errors import BackendUnavailable, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import AllocationRequest, Scheduler

__all__ = ["PATIENCE_S", "AllocationRecord", "Submission", "has_allocation"]

_NAME = "allocation.json"
PATIENCE_S = 600.0
"""How long a scheduler that does not answer is asked again for an allocation, in seconds."""
_AGAIN_S, _CANCEL_S = 15.0, 60.0


class AllocationRecord(msgspec.Struct, frozen=True):
    """What the next service needs to find the allocation of a session again.

    `pem` is the key of the connection, and `port` the port on which the service listened. `job` is empty until the
    scheduler has named the job; until then `job_name` finds it.
    """

    pem: str
    port: int
    job_name: str = ""
    job: str = ""
    minutes: int = 0
    """The time limit of the job; 0 in records of an older version."""
    had_pilot: bool = False
    """Whether the pilot of the job has reported."""

    def save(self, folder: Path) -> None:
        """Raises BackendUnavailable where the folder cannot be written."""
        write_private(folder / _NAME, msgspec.json.encode(self))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """None where no service has left one."""
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((folder / _NAME).read_bytes(), type=cls)
        return None


def has_allocation(folder: Path) -> bool:
    """Whether a session with this folder has a job that its service has not ended."""
    return (folder / _NAME).exists()


class Submission:
    """The jobs of one session. What stands in the folder of the session outlives this process."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.problem = ""
        """What the scheduler said last where it did not answer."""
        self._record: AllocationRecord | None = None

    async def submit(
        self, request: AllocationRequest, script: str, log: Path, record: AllocationRecord, folder: Path
    ) -> str:
        """Submit the job, once, also where the scheduler does not answer for a while; return the id of the job.

        Raises SchedulerRefusal, with nothing submitted, and BackendUnavailable: `find_again` tells whether there is a
        job.
        """
        record = replace(record, job_name=f"rhapsody-{secrets.token_hex(4)}", job="", minutes=request.minutes)
        record.save(folder)
        self._record = record
        try:
            job = await self._submit_once(replace(request, job_name=record.job_name), script, log)
        except SchedulerRefusal:
            self.forget(folder)
            raise
        self.problem = ""
        self._record = replace(self._record, job=job)
        with suppress(BackendUnavailable):  # the name finds the job too
            self._record.save(folder)
        return job

    @property
    def had_pilot(self) -> bool:
        """Whether the pilot of the job has reported, to this service or to an earlier one."""
        return self._record is not None and self._record.had_pilot

    def note_pilot(self, folder: Path) -> None:
        """Note that the pilot of the job has reported."""
        if self._record is not None and not self._record.had_pilot:
            self._record = replace(self._record, had_pilot=True)
            with suppress(BackendUnavailable):
                self._record.save(folder)

    async def _submit_once(self, request: AllocationRequest, script: str, log: Path) -> str:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                return await self._scheduler.submit(request, script, log)
            except SchedulerUnavailable as error:
                self.problem = str(error)
                await asyncio.sleep(_AGAIN_S)
                if job := await self._job_of(request.job_name, deadline):
                    return job

    async def _job_of(self, job_name: str, deadline: float) -> str:
        """The job with this name, which the scheduler may have taken, else an empty text. Waits until it answers."""
        while asyncio.get_running_loop().time() < deadline:
            with suppress(SchedulerUnavailable):
                return next(iter(await self._scheduler.find_jobs(job_name)), "")
            await asyncio.sleep(_AGAIN_S)
        raise BackendUnavailable(
            f"no allocation could be requested, because the scheduler does not answer: {self.problem}"
        )

    async def find_again(self, folder: Path, within_s: float = PATIENCE_S) -> AllocationRecord | None:
        """The record of an earlier service, or of a submission that was interrupted, with its job where there is one.

        Raises BackendUnavailable where the scheduler must be asked, and does not answer.
        """
        record = AllocationRecord.load(folder)
        if record is not None and not record.job:
            deadline = asyncio.get_running_loop().time() + within_s
            record = replace(record, job=await self._job_of(record.job_name, deadline))
        self._record = record
        return record

    async def cancel(self, job: str) -> None:
        """Cancel the job; where the scheduler does not answer, try again for a while. Raises BackendUnavailable where
        the job may go on."""
        deadline = asyncio.get_running_loop().time() + _CANCEL_S
        while True:
            try:
                with suppress(SchedulerRefusal):
                    await self._scheduler.cancel(job)
                return
            except SchedulerUnavailable as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise BackendUnavailable(f"job {job} could not be canceled, and may go on: {error}") from error
            await asyncio.sleep(_AGAIN_S)

    def forget(self, folder: Path) -> None:
        """Forget the job, which is over."""
        self._record = None
        (folder / _NAME).unlink(missing_ok=True)
