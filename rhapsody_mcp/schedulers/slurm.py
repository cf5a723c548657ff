"""Slurm, through its commands."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

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
from rhapsody_mcp.schedulers.slurm_output import (
    ACCOUNTING_FIELDS,
    PARTITION_FORMAT,
    QUEUE_FORMAT,
    is_outage,
    read_accounting,
    read_partitions,
    read_queue,
    read_verdict,
    scheduler_words,
)

__all__ = ["Slurm"]

_TIMEOUT_S = 60.0  # without slurmctld, squeue of Slurm 22.05 gave up after 10 to 20 s
_UNKNOWN_JOB = "Invalid job id"
_DEFAULT_LINES = ("--no-requeue", "--no-kill", "--open-mode=append", "--exclusive")
_OPTIONS = ("partition", "account", "qos", "constraint", "reservation")
_FORBIDDEN = {
    **dict.fromkeys(("--nodes", "-N"), "give nodes of create_session"),
    **dict.fromkeys(("--time", "-t", "--time-min"), "give minutes of create_session"),
    **dict.fromkeys(("--array", "-a", "--clusters", "-M", "--cluster"), "a session has one job on this cluster"),
    **dict.fromkeys(("--wrap", "--wait", "-W", "--test-only", "--parsable", "--output", "-o"), "the session sets it"),
    **dict.fromkeys(("--job-name", "-J", "--quiet", "-Q"), "the session needs it to find the job"),
    **dict.fromkeys(("--help", "-h", "--usage", "--version", "-V"), "it submits nothing"),
}
"""Options that other arguments stand for, or that change what `sbatch` prints or takes, each with what to do."""
_FLAGS = "HIkOsv"
"""One-letter options of `sbatch` without a value: others may follow in the same word."""
_DEAD_STATES = ("down", "error")
"""How the words of `sinfo` for dead nodes begin: "down*" is a node that does not answer. One that is "failing" works,
and is expected to fail."""
_FOREIGN_FORMATS = ("SQUEUE_", "SINFO_", "SACCT_")
"""Variables of users for what the commands print."""


class Slurm(Scheduler):
    """Slurm's commands, with the variables of `environment`, by default those of this process.

    A command that takes longer than `timeout_s` counts as no answer.
    """

    name = "slurm"

    def __init__(self, environment: Mapping[str, str] | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        self._job_environment = dict(os.environ if environment is None else environment)
        kept = {name: value for name, value in self._job_environment.items() if not name.startswith(_FOREIGN_FORMATS)}
        self._environment = {**kept, "SLURM_TIME_FORMAT": "%s"}
        self._timeout_s = timeout_s

    async def version(self) -> str:
        return (await self._ask("sbatch", "--version")).stdout.strip()

    async def submit(self, request: AllocationRequest, script: str, log: Path) -> str:
        partitions = await self.partitions()
        if problem := _exceeded_limit(request, partitions):
            raise SchedulerRefusal(f"{problem}. {_valid(partitions)}")
        output = f"--output={str(log).replace('%', '%%')}"
        arguments = ["sbatch", "--parsable", *_options(request, script), output, f"--chdir={log.parent}"]
        # sbatch hands its variables to the job
        result = await run_command(arguments, self._job_environment, stdin=script, within_s=self._timeout_s)
        if result.exit_code != 0:
            raise _submission_error(result, partitions)
        if not (words := result.stdout.split()):
            raise _unavailable(result)
        return words[-1].partition(";")[0]  # "29", or "29;cluster" in a federation

    async def check(self, request: AllocationRequest, script: str) -> Verdict:
        partitions = await self.partitions()
        result = await self._run(["sbatch", "--test-only", *_options(request, script)], stdin=script)
        if result.exit_code != 0 and is_outage(result.stderr):
            raise _unavailable(result)
        verdict = read_verdict(result.exit_code, result.stderr)
        # Slurm may accept a job over a limit and never start it, or refuse it without saying which limit
        if problem := _exceeded_limit(request, partitions):
            return Verdict(accepted=False, words=problem, valid=_valid(partitions))
        valid = "" if verdict.accepted else f"{_advice(verdict.words)}{_valid(partitions)}"
        return msgspec.structs.replace(verdict, valid=valid)

    async def status(self, job_ids: Collection[str]) -> dict[str, JobStatus]:
        if not job_ids:
            return {}
        listed = ",".join(job_ids)
        result = await self._run(["squeue", "-h", "-t", "all", "-j", listed, "-O", QUEUE_FORMAT])
        if result.exit_code != 0 and _UNKNOWN_JOB not in result.stderr:
            raise _unavailable(result)
        known = read_queue(result.stdout)
        forgotten = [job_id for job_id in job_ids if job_id not in known]
        known |= await self._accounting(forgotten) if forgotten else {}
        return {job_id: known.get(job_id, JobStatus(state=JobState.UNKNOWN)) for job_id in job_ids}

    async def _accounting(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """What Slurm's database, or the log of ended jobs, knows; many sites have only one of them, or none."""
        for source in (["-X"], ["-c"]):
            command = ["sacct", *source, "-P", "-n", "-j", ",".join(job_ids), "-o", ACCOUNTING_FIELDS]
            try:
                result = await self._run(command)
            except SchedulerUnavailable:
                continue
            if result.exit_code == 0:
                return read_accounting(result.stdout)
        return {}

    async def dead_script_node(self, job_id: str) -> str:
        node = (await self._ask("squeue", "-h", "-j", job_id, "-O", "BatchHost:256")).stdout.strip()
        state = (await self._ask("sinfo", "-h", "-N", "-n", node, "-o", "%T")).stdout if node else ""
        return node if state.startswith(_DEAD_STATES) else ""

    async def find_jobs(self, job_name: str) -> list[str]:
        result = await self._ask("squeue", "-h", "-t", "all", "-n", job_name, "-u", getpass.getuser(), "-o", "%i")
        return result.stdout.split()

    async def cancel(self, job_id: str) -> None:
        result = await self._run(["scancel", job_id])
        if result.exit_code != 0 and is_outage(result.stderr):
            raise _unavailable(result)
        if result.exit_code != 0 and _UNKNOWN_JOB not in result.stderr:
            raise SchedulerRefusal(f"Slurm did not cancel job {job_id}: {scheduler_words(result.stderr)}.")

    async def partitions(self) -> list[Partition]:
        return read_partitions((await self._ask("sinfo", "-h", "-o", PARTITION_FORMAT)).stdout)

    async def _ask(self, *arguments: str) -> CommandResult:
        """Run a command that fails only where Slurm does not answer."""
        result = await self._run(arguments)
        if result.exit_code != 0:
            raise _unavailable(result)
        return result

    async def _run(self, arguments: Sequence[str], stdin: str = "") -> CommandResult:
        return await run_command(arguments, self._environment, stdin=stdin, within_s=self._timeout_s)


def _options(request: AllocationRequest, script: str) -> list[str]:
    """The options of `sbatch`; of an option that stands twice, `sbatch` takes the last."""
    if not script.startswith("#!"):
        raise no_interpreter()
    for line in request.lines:
        if (option := _forbidden_option(line)) is not None:
            raise InvalidRequest(
                f"the line {line!r} cannot be given to the scheduler: it is {option} of sbatch: {_FORBIDDEN[option]}. "
                f"Valid is any option of sbatch but {', '.join(name for name in _FORBIDDEN if name[1] == '-')}.",
                field="lines",
            )
    return [*_field_options(request), *_DEFAULT_LINES, *request.lines]


def _forbidden_option(line: str) -> str | None:
    """The forbidden option that `sbatch` takes this line for, also abbreviated, as in "-N4", "-HN4" and "--arr=0-9"."""
    name = re.split(r"[=\s]", line.strip(), maxsplit=1)[0]
    if name.startswith("--"):
        return next((option for option in _FORBIDDEN if option.startswith(name)), None)
    short = f"-{name[1:].lstrip(_FLAGS)[:1]}"
    return short if short in _FORBIDDEN else None


def _field_options(request: AllocationRequest) -> Iterator[str]:
    yield from (f"--nodes={request.nodes}", f"--time={request.minutes}", f"--job-name={request.job_name}")
    yield from (f"--{name}={value}" for name in _OPTIONS if (value := getattr(request, name)))
    if request.gpus_per_node:
        yield f"--gpus-per-node={request.gpus_per_node}"
    if request.signal_s is not None:
        yield f"--signal=B:USR1@{request.signal_s}"


def _exceeded_limit(request: AllocationRequest, partitions: Sequence[Partition]) -> str:
    """Why no partition that the request may run in has room; empty where one has, or where no such one is known."""
    names = request.partition.split(",")
    chosen = [one for one in partitions if (one.name in names if request.partition else one.default)]
    problems = [one.why_too_small(request) for one in chosen]
    return "; ".join(problems) if all(problems) else ""


def _submission_error(result: CommandResult, partitions: Sequence[Partition]) -> Exception:
    if is_outage(result.stderr):
        return _unavailable(result)
    words = scheduler_words(result.stderr)
    return SchedulerRefusal(f"Slurm refused the job: {words}. {_advice(words)}{_valid(partitions)}")


def _advice(words: str) -> str:
    lowered = words.lower()
    if "account" in lowered or "qos" in lowered:
        return "`sacctmgr show assoc user=$USER format=account,partition,qos` lists the accounts and QOS of a user. "
    if "reservation" in lowered:
        return "`scontrol show reservation` lists the reservations. "
    if "feature" in lowered:
        return "`sinfo -o '%P %f'` lists the features that a constraint can name. "
    return ""


def _valid(partitions: Sequence[Partition]) -> str:
    return f"Partitions: {'; '.join(map(_describe, partitions)) or 'none'}."


def _describe(partition: Partition) -> str:
    limit = "no time limit" if partition.limit_minutes is None else f"{partition.limit_minutes} minutes at most"
    most = "" if partition.max_nodes is None else f" ({partition.max_nodes} a job)"
    gpus = f", {partition.gpus} GPUs a node" if partition.gpus else ""
    return f"{partition.name} with {partition.nodes} nodes{most}{gpus}, {limit}"


def _unavailable(result: CommandResult) -> SchedulerUnavailable:
    words = scheduler_words(result.stderr or result.stdout) or f"exit code {result.exit_code}"
    return SchedulerUnavailable(f"Slurm does not answer: {words}. Try again later.")
