"""Hosts without a scheduler, each reached by ssh: a job gets hosts that no other job of the user has."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.model.errors import SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.schedulers import host_scripts as scripts
from rhapsody_mcp.schedulers.base import (
    AllocationRequest,
    JobState,
    JobStatus,
    Partition,
    Scheduler,
    Verdict,
    no_interpreter,
)
from rhapsody_mcp.schedulers.commands import run_command
from rhapsody_mcp.schedulers.ssh import ssh_command, ssh_words

__all__ = ["SshHosts"]

_TIMEOUT_S = 20.0
_SSH_FAILED, _TIME_IS_UP, _SIGNALED = 255, 124, 128
"""Exit codes: of ssh; of timeout; and the sum of this and the number of a signal."""
_LOG_LINES = 5
_SKEW_S = 60.0
"""How far the clocks of a host and of this machine may differ, with the end of a job, in seconds."""


class _Host(msgspec.Struct, frozen=True):
    """What a host said: `problem` is why the host cannot be used, `held` the job that has the host."""

    name: str
    problem: str = ""
    cores: int = 0
    memory_mb: int = 0
    held: str = ""
    first: str = ""
    until: float = 0.0

    @property
    def is_free(self) -> bool:
        return not self.problem and not self.held

    @property
    def words(self) -> str:
        if self.problem:
            return self.problem
        until = time.strftime("%H:%M", time.localtime(self.until))
        return f"{self.name} is in use by {self.held}, until {until} at most" if self.held else f"{self.name} is free"


class SshHosts(Scheduler):
    """The hosts with these names, as ssh takes them, in the order in which jobs get them.

    The id of a job is its name, "@", and the host of its script. A job ends at its time limit by itself. Where its host
    does not answer, the job counts as ended only after that time. `signal_s` of a request has no effect.
    """

    name = "ssh"

    def __init__(
        self, hosts: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> None:
        by_name = {_bare(host): host for host in hosts}
        self._hosts, self._timeout_s = tuple(by_name.values()), timeout_s
        self._environment = dict(os.environ if environment is None else environment)
        self._ends: dict[str, float] = {}
        """The time limit of each job that was seen to run."""
        self._asked: dict[str, str] = {}
        """The host that was asked to start a job, by the name of the job."""

    async def version(self) -> str:
        answer = await run_command(["ssh", "-V"], self._environment, within_s=self._timeout_s)
        return (answer.stderr or answer.stdout).strip()

    async def submit(self, request: AllocationRequest, script: str, log: Path) -> str:
        interpreter = _interpreter(script)
        hosts = await self._probe()
        usable = [host.name for host in hosts if host.is_free or host.held == request.job_name]
        names = await self._claim(request, usable)
        if len(names) < request.nodes:
            await self._free(request.job_name, names)
            raise SchedulerRefusal(_too_few(request, await self._probe()))
        job_id, probe = f"{request.job_name}@{names[0]}", log.with_name(f".probe-{secrets.token_hex(8)}")
        variables = {"job": request.job_name, "id": job_id, "hosts": ",".join(names), "interpreter": interpreter}
        variables |= {"seconds": str(60 * request.minutes), "probe": str(probe), "shared_log": str(log)}
        self._asked[request.job_name] = names[0]
        probe.touch()
        try:
            code, words = await self._run(names[0], scripts.START, script=script, **variables)
        finally:
            probe.unlink(missing_ok=True)
        if code != 0:
            await self._free(request.job_name, names)
            raise SchedulerUnavailable(f"host {names[0]} does not start the job: {words}.")
        self._ends[job_id] = time.time() + 60 * request.minutes
        return job_id

    async def check(self, request: AllocationRequest, script: str) -> Verdict:
        _interpreter(script)
        hosts = await self._probe()
        chosen = [host for host in hosts if host.is_free][: request.nodes]
        others = [host.words for host in hosts if not host.is_free]
        if len(chosen) < request.nodes:
            return Verdict(False, _too_few(request, hosts), valid="Give other hosts, or fewer nodes.")
        if problem := await self._unreached([host.name for host in chosen]):
            return Verdict(False, problem, valid="The first host must reach the others by ssh, without a password.")
        names = [host.name for host in chosen]
        return Verdict(True, "; ".join(filter(None, [f"free: {_listed(names)}", *others])), nodes=tuple(names))

    async def status(self, job_ids: Collection[str]) -> dict[str, JobStatus]:
        return dict(zip(job_ids, await asyncio.gather(*map(self._status, job_ids)), strict=True))

    async def find_jobs(self, job_name: str) -> list[str]:
        hosts = [self._asked[job_name]] if job_name in self._asked else self._hosts
        answers = await asyncio.gather(*(self._ask(host, scripts.EXISTS, job=job_name) for host in hosts))
        return [f"{job_name}@{host}" for host, answer in zip(hosts, answers, strict=True) if answer]

    async def cancel(self, job_id: str) -> None:
        name, host = _parts(job_id)
        await self._ask(host, scripts.CANCEL, job=name)

    async def partitions(self) -> list[Partition]:
        hosts = await self._probe()
        answering = [host for host in hosts if not host.problem]
        return [
            Partition(
                name="hosts",
                default=True,
                state="up" if answering else "down",
                nodes=len(hosts),
                idle=sum(host.is_free for host in hosts),
                cores=min((host.cores for host in answering), default=0),
                memory_mb=min((host.memory_mb for host in answering), default=0),
                gpus=0,
                limit_minutes=None,
                max_nodes=None,
            )
        ]

    # --- hosts

    async def _probe(self) -> list[_Host]:
        """What each host says. Raises SchedulerUnavailable where none answers."""
        hosts = list(await asyncio.gather(*map(self._look_at, self._hosts)))
        if all(host.problem for host in hosts):
            raise SchedulerUnavailable(f"no host can be used: {'; '.join(host.problem for host in hosts)}.")
        return hosts

    async def _look_at(self, name: str) -> _Host:
        try:
            lines = (await self._ask(name, scripts.PROBE)).splitlines()
        except SchedulerUnavailable as error:
            return _Host(name, str(error).rstrip("."))
        if not lines or (first := lines[0].split())[0] != "host" or len(first) != 4:
            return _Host(name, f"host {name} prints something of its own for a shell without a terminal: {lines[:1]}")
        _, own_name, cores, memory_mb = first
        if _short(own_name) != _short(_bare(name)):
            problem = f"host {name} calls itself {own_name}: use that name, by an entry of ~/.ssh/config if needed"
            return _Host(name, problem)
        host = _Host(name, "", int(cores), int(memory_mb))
        if len(lines) == 1:
            return host
        _, job, script_host, until = lines[1].split()
        if await self._has_ended(f"{job}@{script_host}"):
            await self._free(job, [name])
            return host
        return msgspec.structs.replace(host, held=job, first=script_host, until=float(until))

    async def _has_ended(self, job_id: str) -> bool:
        with suppress(SchedulerUnavailable):
            return (await self._status(job_id)).state in (JobState.ENDED, JobState.UNKNOWN)
        return False

    async def _claim(self, request: AllocationRequest, names: Sequence[str]) -> list[str]:
        """Take the first hosts that are free, as many as the request has nodes; fewer where others took them first.

        The host of the script is taken before the others, whose notes name it.
        """
        claimed: list[str] = []
        rest, seconds = list(names), str(60 * request.minutes)
        while rest and len(claimed) < request.nodes:
            missing = request.nodes - len(claimed) if claimed else 1
            batch, rest = rest[:missing], rest[missing:]
            first = (claimed or batch)[0]
            answers = await asyncio.gather(
                *(self._run(name, scripts.CLAIM, job=request.job_name, first=first, seconds=seconds) for name in batch),
                return_exceptions=True,
            )
            claimed += [name for name, answer in zip(batch, answers, strict=True) if answer == (0, "")]
        return claimed

    async def _free(self, job: str, names: Sequence[str]) -> None:
        await asyncio.gather(*(self._ask(name, scripts.FREE, job=job) for name in names), return_exceptions=True)

    async def _unreached(self, names: Sequence[str]) -> str:
        """Which of the hosts the first one does not reach, in words; empty where it reaches all."""
        ssh = shlex.join(ssh_command("", "")[:-2])
        answer = await self._ask(names[0], scripts.REACH, ssh=ssh, others=" ".join(names[1:]))
        lines = [line.partition(" ") for line in answer.splitlines()]
        return "; ".join(f"{names[0]} does not reach {host}: {ssh_words(words)}" for host, _, words in lines)

    # --- jobs

    async def _status(self, job_id: str) -> JobStatus:
        name, host = _parts(job_id)
        try:
            answer = await self._ask(host, scripts.STATUS, job=name)
        except SchedulerUnavailable as error:
            if time.time() < self._ends.get(job_id, float("inf")) + _SKEW_S:
                raise
            return JobStatus(state=JobState.ENDED, scheduler_state="TIMEOUT", reason=str(error).rstrip("."))
        try:
            status = _read_status(answer)
        except ValueError:
            raise SchedulerUnavailable(f"host {host} does not say how the job is: {answer[:200]!r}.") from None
        if status.state is JobState.RUNNING and status.ends_at is not None:
            self._ends[job_id] = status.ends_at
        return status

    async def _ask(self, host: str, program: str, /, **variables: str) -> str:
        """What a script prints on a host. Raises SchedulerUnavailable where it fails."""
        code, text = await self._run(host, program, **variables)
        if code != 0:
            raise SchedulerUnavailable(f"host {host} does not do what is asked: {text}.")
        return text

    async def _run(self, host: str, program: str, /, **variables: str) -> tuple[int, str]:
        """The exit code of a script on a host, and what it printed, or its last words where it failed.

        Raises SchedulerUnavailable where the host does not answer.
        """
        assignments = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
        command = ssh_command(host, "exec /bin/sh -s")
        text = f"{assignments}{scripts.COMMON}{program}"
        try:
            result = await run_command(command, self._environment, stdin=text, within_s=self._timeout_s)
        except SchedulerUnavailable as error:
            problem = str(error) if "could not be started" in str(error) else f"nothing in {self._timeout_s:g} s."
            raise SchedulerUnavailable(f"host {host} does not answer: {problem}") from None
        if result.exit_code == _SSH_FAILED:
            raise SchedulerUnavailable(f"host {host} does not answer: {ssh_words(result.stderr)}.")
        return result.exit_code, result.stdout if result.exit_code == 0 else ssh_words(result.stderr)


def _parts(job_id: str) -> tuple[str, str]:
    name, _, host = job_id.partition("@")
    return name, host


def _bare(host: str) -> str:
    """The name of a host without the user."""
    return host.rpartition("@")[2]


def _short(name: str) -> str:
    return name.split(".")[0]


def _interpreter(script: str) -> str:
    """The interpreter of a script with its options: the folder of temporary files may hold no programs."""
    first = script.partition("\n")[0]
    if not first.startswith("#!/"):
        raise no_interpreter()
    return first[2:].strip()


def _too_few(request: AllocationRequest, hosts: Sequence[_Host]) -> str:
    free = [host.name for host in hosts if host.is_free]
    others = "; ".join(host.words for host in hosts if not host.is_free)
    return (
        f"{request.nodes} nodes were asked for, and of the {len(hosts)} hosts {len(free)} can be used"
        f"{f' ({_listed(free)})' if free else ''}{f': {others}' if others else ''}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _read_status(answer: str) -> JobStatus:
    """The status in what `STATUS` prints."""
    head, _, log = answer.partition("\nlog\n")
    lines = [line.split() for line in head.splitlines()]
    if len(lines) < 2:
        return JobStatus(state=JobState.PENDING if lines == [["starting"]] else JobState.UNKNOWN)
    (_, started, ends, hosts), (word, *ended) = lines[:2]
    status = JobStatus(
        state=JobState.RUNNING,
        scheduler_state="RUNNING",
        nodes=tuple(hosts.split(",")),
        submitted_at=float(started),
        started_at=float(started),
        ends_at=float(ends),
    )
    if word == "running":
        return status
    code, at = (int(ended[0]), float(ended[1])) if ended else (None, None)
    return msgspec.structs.replace(
        status,
        state=JobState.ENDED,
        scheduler_state=_ended_state(code, ["canceled"] in lines),
        reason="" if ended else "its processes ended without a word, as where the host was started again",
        explanation=" | ".join(log.splitlines()[-_LOG_LINES:]),
        nodes=() if log else status.nodes,
        ends_at=at,
        exit_code=code if code is None or code <= _SIGNALED else _SIGNALED - code,
    )


def _ended_state(code: int | None, is_canceled: bool) -> str:
    if is_canceled:
        return "CANCELLED"
    return {0: "COMPLETED", _TIME_IS_UP: "TIMEOUT"}.get(code if code is not None else -1, "FAILED")
