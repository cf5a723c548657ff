"""PBS Pro, Torque, LSF and Grid Engine, through Parsl's providers."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers.base import (
    AllocationRequest,
    JobState,
    JobStatus,
    Partition,
    Scheduler,
    Verdict,
    no_interpreter,
)
from rhapsody_mcp.schedulers.commands import CommandResult, run_command
from rhapsody_mcp.schedulers.parsl_call import ParslCall, make_known, option_key
from rhapsody_mcp.schedulers.parsl_kinds import ParslKind

__all__ = ["ParslScheduler"]

_TIMEOUT_S = 60.0
_UNLISTED_S = 30.0
_FOLDER = "scheduler"
"""The folder beside the log of a job for the files of Parsl and of the scheduler."""
_CHOICES = ("nodes", "partition", "account", "qos", "constraint", "reservation", "gpus_per_node", "signal_s")
_DEFAULTS = AllocationRequest(nodes=1, minutes=1)
_OUTAGE = re.compile(
    r"cannot connect|[Cc]onnection (?:refused|timed out|reset)|[Uu]nable to (?:contact|communicate|send message)|"
    r"[Cc]ommunication failure|commlib error|not responding|LSF is down|Invalid credential|end of message|[Tt]imed out"
)
"""What commands say where the scheduler does not answer."""
_GONE = re.compile(
    r"[Uu]nknown [Jj]ob|has (?:already )?finished|is not found|No matching job|does not exist|Invalid job id|"
    r"invalid (?:job id|state for job)|Request invalid for state"
)
"""What commands say of a job that has ended, or that the scheduler has forgotten."""
_STATES = {
    "UNKNOWN": (JobState.PENDING, "Parsl does not know this state"),
    "PENDING": (JobState.PENDING, ""),
    "HELD": (JobState.PENDING, "held, suspended or in error"),
    "RUNNING": (JobState.RUNNING, ""),
    "COMPLETED": (JobState.ENDED, "the job has left the queue; whether the job succeeded is not known"),
    "FAILED": (JobState.ENDED, "the job script failed, or the job was killed"),
    "CANCELLED": (JobState.ENDED, "the job was canceled"),
    "TIMEOUT": (JobState.ENDED, "the job reached the time limit"),
}
"""Parsl's states: whether the job is over, and what the state means."""


class ParslScheduler(Scheduler):
    """A scheduler with the variables of `environment`, by default those of this process.

    A command that takes longer than `timeout_s` counts as no answer. Parsl is imported with the first call.
    """

    def __init__(
        self, kind: ParslKind, environment: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> None:
        self.name = kind.name
        self._kind, self._timeout_s = kind, timeout_s
        self._environment = dict(os.environ if environment is None else environment)
        self._scripts: dict[str, Path] = {}
        self._submitted_at: dict[str, float] = {}

    async def version(self) -> str:
        result = await self._run(self._kind.version)
        number = re.search(r"\d+\.\w+(?:\.\w+)*", result.stdout + result.stderr)
        return f"{self._kind.title} {number[0]}" if number else self._kind.title

    async def submit(self, request: AllocationRequest, script: str, log: Path) -> str:
        options = self._options(request, script)
        folder = _script_folder(log)
        file = _store(script, folder / f"{request.job_name}.job")
        command = f"cd {shlex.quote(str(log.parent))} && exec {shlex.quote(str(file))} >>{shlex.quote(str(log))} 2>&1"

        def work(provider: Any) -> str | None:
            provider.script_dir = str(folder)
            job: str | None = provider.submit(command, 1, request.job_name)
            return job

        call = self._call(options)
        job = await call.run(
            work,
            nodes_per_block=request.nodes,
            walltime=f"{request.minutes // 60:02}:{request.minutes % 60:02}:00",
        )
        if not job:
            raise self._submission_error(call.last, file)
        self._scripts[job], self._submitted_at[job] = file, time.monotonic()
        return job

    def _submission_error(self, result: CommandResult | None, file: Path) -> Exception:
        if result is None or result.exit_code == 0:
            words = _words(result) if result is not None else ""
            return SchedulerUnavailable(f"{self._kind.title} gave no job id: {words or 'no words'}.")
        if _is_outage(result):
            return self._unavailable(result)
        file.unlink(missing_ok=True)
        return SchedulerRefusal(f"{self._kind.title} refused the job: {_words(result)}.")

    async def check(self, request: AllocationRequest, script: str) -> Verdict:
        self._options(request, script)
        words = (
            f"{self._kind.title} cannot be asked without submitting the job: the first task submits, and then the "
            "answer is known"
        )
        return Verdict(accepted=True, words=words, is_asked=False)

    async def status(self, job_ids: Collection[str]) -> dict[str, JobStatus]:
        return {job: await self._job_status(job) for job in job_ids}

    async def _job_status(self, job: str) -> JobStatus:
        """Jobs are asked for one by one: of several, commands fail where one is forgotten."""

        def work(provider: Any) -> Any:
            asked = make_known(provider, job)
            (answer,) = provider.status([job])
            return None if answer is asked else answer

        call = self._call()
        answer = await call.run(work)
        is_gone = call.last is not None and _is_gone(call.last)
        if call.last is not None and call.last.exit_code != 0 and not is_gone:
            raise self._unavailable(call.last)
        status = self._unlisted(job) if is_gone or answer is None else _read(answer)
        if status.state in (JobState.ENDED, JobState.UNKNOWN) and (script := self._scripts.pop(job, None)):
            script.unlink(missing_ok=True)
        return status

    def _unlisted(self, job: str) -> JobStatus:
        """The status of a job that the scheduler does not list; LSF lists a new job a few seconds late."""
        if time.monotonic() - self._submitted_at.get(job, -inf) < _UNLISTED_S:
            return JobStatus(state=JobState.PENDING, scheduler_state="PENDING", explanation="not listed yet")
        return JobStatus(state=JobState.UNKNOWN)

    async def find_jobs(self, job_name: str) -> list[str]:
        result = await self._run(self._kind.listing.format(name=shlex.quote(job_name)))
        if result.exit_code != 0 and not _is_gone(result):
            raise self._unavailable(result)
        return re.findall(self._kind.listed.format(name=re.escape(job_name)), result.stdout, re.MULTILINE)

    async def cancel(self, job_id: str) -> None:
        def work(provider: Any) -> None:
            make_known(provider, job_id)
            provider.cancel([job_id])

        call = self._call()
        await call.run(work)
        if call.last is None or call.last.exit_code == 0 or _is_gone(call.last):
            return
        if _is_outage(call.last):
            raise self._unavailable(call.last)
        raise SchedulerRefusal(f"{self._kind.title} did not cancel job {job_id}: {_words(call.last)}.")

    async def partitions(self) -> list[Partition]:
        return []

    def _call(self, options: Sequence[str] = ()) -> ParslCall:
        return ParslCall(self._kind, self._environment, self._timeout_s, options)

    async def _run(self, command: str) -> CommandResult:
        return await run_command(command.split(), self._environment, within_s=self._timeout_s)

    def _unavailable(self, result: CommandResult) -> SchedulerUnavailable:
        words = _words(result) or f"exit code {result.exit_code}"
        return SchedulerUnavailable(f"{self._kind.title} does not answer: {words}. Try again later.")

    # --- options

    def _options(self, request: AllocationRequest, script: str) -> list[str]:
        """The options in the job script; of two with one name, the one from `lines` of the request.

        In `lines`, "{nodes}" stands for the number of nodes. Raises InvalidRequest.
        """
        if not script.startswith("#!"):
            raise no_interpreter()
        lines = [line.replace("{nodes}", str(request.nodes)) for line in request.lines]
        for line in lines:
            self._check_line(line)
        given = {option_key(line, self._kind.same) for line in lines}
        for field in _CHOICES:
            self._check_field(request, field, given)
        own = [*self._field_options(request), *self._kind.always]
        return [*(line for line in own if option_key(line, self._kind.same) not in given), *lines]

    def _field_options(self, request: AllocationRequest) -> Iterator[str]:
        values = msgspec.structs.asdict(request)
        yield from (option.format(**values) for field, option in self._kind.options.items() if values[field])

    def _check_line(self, line: str) -> None:
        if len(line.splitlines()) != 1:
            raise InvalidRequest(
                f"the line {line!r} cannot be given to the scheduler: valid is one line.", field="lines"
            )
        if {option_key(line), line.split()[0]} & {*self._kind.forbidden}:
            raise InvalidRequest(
                f"the line {line!r} cannot be given to the scheduler: valid is any option of {self._kind.title} but "
                f"{', '.join(self._kind.forbidden)}.",
                field="lines",
            )

    def _check_field(self, request: AllocationRequest, field: str, given: Collection[str]) -> None:
        value = getattr(request, field)
        if isinstance(value, str) and len(value.split()) > 1:
            raise InvalidRequest(f"{field} is {value!r}; valid is one word.", field=field)
        option = self._kind.instead.get(field, "")
        is_expressed = field in self._kind.options or (option_key(option) in given if option else field == "nodes")
        if value == getattr(_DEFAULTS, field) or is_expressed:
            return
        advice = f": use lines in its place, as in lines=[{option!r}]" if option else ""
        raise InvalidRequest(f"{field} is {value!r}, and {self._kind.title} has no {field} here{advice}.", field=field)


def _script_folder(log: Path) -> Path:
    folder = log.parent.absolute() / _FOLDER
    if shlex.quote(str(folder)) != str(folder):
        raise SchedulerRefusal(
            f"the folder {str(log.parent)!r} has a character that Parsl cannot give to the scheduler: start the "
            "service with a state folder whose path has letters, digits, - _ . and / alone "
            "(rhapsody-mcp stdio --folder FOLDER)."
        )
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    return folder


def _store(script: str, file: Path) -> Path:
    """A script may hold keys: only this user can read the file."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o700), "w", encoding="utf-8") as stored:
        stored.write(script)
    return file


def _read(answer: Any) -> JobStatus:
    """The status of a job that Parsl has an answer for."""
    name = answer.state.name
    state, explanation = _STATES.get(name, (JobState.ENDED, ""))
    word = "ENDED" if name == "COMPLETED" else name
    return JobStatus(state=state, scheduler_state=word, explanation=explanation, exit_code=answer.exit_code)


def _words(result: CommandResult) -> str:
    """What a command said, in one line, without its name."""
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    words = (re.sub(r"^(?:q\w+|b\w+|[Ee]rror|ERROR|Unable to run job): +", "", line.strip()) for line in lines)
    return "; ".join(dict.fromkeys(filter(None, words))).rstrip(".")


def _is_gone(result: CommandResult) -> bool:
    """Whether the scheduler has forgotten the job, or the job has ended; LSF says so with exit code 0 too."""
    return _GONE.search(_words(result) if result.exit_code else result.stderr) is not None


def _is_outage(result: CommandResult) -> bool:
    return result.exit_code == 127 or _OUTAGE.search(_words(result)) is not None
