"""Reads what Slurm's commands print."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from rhapsody_mcp.schedulers.base import JobState, JobStatus, Partition, Verdict
from rhapsody_mcp.schedulers.hostlist import expand_hostlist

__all__ = [
    "ACCOUNTING_FIELDS",
    "PARTITION_FORMAT",
    "QUEUE_FORMAT",
    "is_outage",
    "read_accounting",
    "read_partitions",
    "read_queue",
    "read_verdict",
    "scheduler_words",
]

_QUEUE_FIELDS = ("JobID", "State", "NodeList", "SubmitTime", "StartTime", "EndTime", "exit_code", "Reason")
QUEUE_FORMAT = ",".join(f"{field}:|" for field in _QUEUE_FIELDS)
"""For `squeue -O`; a reason may have any text, so the reason comes last."""
ACCOUNTING_FIELDS = "JobID,State,NodeList,Start,End,ExitCode"
"""For `sacct -o`: fields that the database and the log of ended jobs both have."""
PARTITION_FORMAT = "%P|%a|%T|%D|%c|%m|%l|%s|%G"
"""For `sinfo -o`: one line for each set of equal nodes of a partition."""

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
_ENDED |= {"DEADLINE", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"}
_STATES = {
    **dict.fromkeys(_WAITING, JobState.PENDING),
    **dict.fromkeys(_RUNNING, JobState.RUNNING),
    **dict.fromkeys(_ENDED, JobState.ENDED),
}

_REASONS = {
    "Priority": "other jobs are ahead in the queue",
    "Resources": "waits until enough nodes are free",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that ended another way than asked for: will never start",
    "BeginTime": "may not start before a set time",
    "JobHeldUser": "held by its user: `scontrol release` lets the job start",
    "JobHeldAdmin": "held by an administrator: only an administrator can let the job start",
    "PartitionTimeLimit": "asks for more time than the partition gives: will not start",
    "PartitionNodeLimit": "asks for more nodes than the partition has: will not start",
    "PartitionConfig": "exceeds a limit of the partition: will not start",
    "PartitionDown": "the partition is down: an administrator must start the partition",
    "PartitionInactive": "the partition takes no jobs now",
    "ReqNodeNotAvail": "nodes that the job needs are down, or reserved for maintenance",
    "Reservation": "waits for the start of a reservation",
    "ReservationDeleted": "the reservation is gone: will not start",
    "Licenses": "waits for a license",
    "BadConstraints": "no node has what the job asks for: will not start",
    "InvalidAccount": "the account does not exist or is not this user's: will not start",
    "InvalidQOS": "the QOS does not exist or is not this user's: will not start",
    "AccountNotAllowed": "the partition does not take jobs of this account",
    "QOSNotAllowed": "the partition does not take jobs of this QOS",
    "BurstBufferResources": "waits for space in the burst buffer",
    "Cleaning": "the nodes of the earlier run are still being cleaned up",
    "NodeDown": "a node that the job needs is down",
    "MaxRequeue": "was run again too many times: held",
    "launch_failed_requeued_held": "could not be started on its nodes: held",
    "TimeLimit": "reached the time limit",
    "NonZeroExitCode": "the job script failed",
    "JobLaunchFailure": "the job script could not be started, or was killed",
    "OutOfMemory": "used more memory than asked for",
    "SystemFailure": "the system failed",
    "None": "",
}
_LIMITS = {"Assoc": "the account", "QOS": "the QOS"}


def read_queue(text: str) -> dict[str, JobStatus]:
    """The jobs in the output of `squeue -h -t all -O QUEUE_FORMAT` with times in seconds."""
    return dict(_queue_entry(line) for line in text.splitlines() if line.count("|") >= len(_QUEUE_FIELDS))


def _queue_entry(line: str) -> tuple[str, JobStatus]:
    job_id, word, nodes, submitted, start, end, status, reason = line.split("|", len(_QUEUE_FIELDS) - 1)
    reason = reason.rstrip().removesuffix("|")
    state = _STATES.get(word, JobState.UNKNOWN)
    pending = state is JobState.PENDING
    return job_id, JobStatus(
        state=state,
        scheduler_state=word,
        reason="" if reason == "None" else reason,
        explanation=_explain(reason),
        nodes=expand_hostlist(nodes),
        submitted_at=_time(submitted),
        started_at=None if pending else _time(start),
        estimated_start=_time(start) if pending else None,
        ends_at=None if pending else _time(end),
        exit_code=_wait_status(status) if state is JobState.ENDED else None,
    )


def read_accounting(text: str) -> dict[str, JobStatus]:
    """The ended jobs in the output of `sacct -P -n -o ACCOUNTING_FIELDS` with times in seconds.

    A job that was run again has a line for each run: the last end counts. Jobs that have not ended are left out,
    because the queue would know them.
    """
    statuses: dict[str, JobStatus] = {}
    for line in text.splitlines():
        job_id, word, nodes, start, end, code = line.split("|")
        word = word.partition(" ")[0]  # of "CANCELLED by 1000"
        before = statuses.get(job_id)
        if word in _ENDED and (before is None or (before.ends_at or 0) <= (_time(end) or 0)):
            statuses[job_id] = JobStatus(
                state=JobState.ENDED,
                scheduler_state=word,
                nodes=expand_hostlist(nodes),
                started_at=_time(start),
                ends_at=_time(end),
                exit_code=_exit_code(*code.split(":")),
            )
    return statuses


def _explain(reason: str) -> str:
    """What a reason such as "ReqNodeNotAvail, UnavailableNodes:node7" or "AssocGrpCpuLimit" means in plain words."""
    name = re.split(r"[,(: ]", reason, maxsplit=1)[0]
    for prefix, owner in _LIMITS.items():
        if name not in _REASONS and name.startswith(prefix) and "Limit" in name:
            return f"{owner} is at a limit of its own ({name}): starts when other jobs have ended, or never"
    return _REASONS.get(name, "")


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _wait_status(text: str) -> int | None:
    """Of the status that wait(2) gives, or of "3:0", as versions of Slurm differ."""
    if ":" in text:
        return _exit_code(*text.split(":"))
    return _exit_code(int(text) >> 8, int(text) & 0x7F) if text.isdigit() else None


def _exit_code(code: str | int, signal: str | int = 0) -> int:
    return -int(signal) if int(signal) else int(code)


class _Nodes(msgspec.Struct, frozen=True):
    """A set of equal nodes of one partition."""

    default: bool
    available: str
    state: str
    count: int
    cores: int
    memory_mb: int
    limit_minutes: int | None
    max_nodes: int | None
    gpus: int


def read_partitions(text: str) -> list[Partition]:
    """The partitions in the output of `sinfo -h -o PARTITION_FORMAT`."""
    sets: dict[str, list[_Nodes]] = defaultdict(list)
    for line in text.splitlines():
        name, available, state, count, cores, memory, limit, sizes, gres = line.split("|", 8)
        sets[name.removesuffix("*")].append(
            _Nodes(
                default=name.endswith("*"),
                available=available,
                state=state,
                count=int(count),
                cores=_number(cores),
                memory_mb=_number(memory),
                limit_minutes=_minutes(limit),
                max_nodes=_largest(sizes),
                gpus=_gpus(gres),
            )
        )
    return [_partition(name, nodes) for name, nodes in sets.items()]


def _partition(name: str, sets: Sequence[_Nodes]) -> Partition:
    first = sets[0]
    return Partition(
        name=name,
        default=first.default,
        state=first.available,
        nodes=sum(nodes.count for nodes in sets),
        idle=sum(nodes.count for nodes in sets if nodes.state == "idle"),  # "idle*" does not answer, "idle~" is off
        cores=min(nodes.cores for nodes in sets),
        memory_mb=min(nodes.memory_mb for nodes in sets),
        gpus=max(nodes.gpus for nodes in sets),
        limit_minutes=first.limit_minutes,
        max_nodes=first.max_nodes,
    )


def _number(text: str) -> int:
    """Of "8000" or "8000+"."""
    return int(match[0]) if (match := re.match(r"\d+", text)) else 0


def _largest(sizes: str) -> int | None:
    """The last number of "1-4" or "4"; None for "1-infinite"."""
    last = sizes.rpartition("-")[2]
    return int(last) if last.isdigit() else None


def _gpus(gres: str) -> int:
    """Of "gpu:a100:4(S:0-1),nvme:1" or "gpu:4"."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^:,(]*)?:(\d+)", gres))


def _minutes(limit: str) -> int | None:
    """Of "2-12:00:00", "1:00:00" or "30:00", rounded down; None for "infinite"."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):\d+", limit)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


_ESTIMATE = re.compile(r"Job \d+ to start at (\S+) .*?(?: on nodes (\S+))?(?: in partition \S+)?$", re.MULTILINE)


def read_verdict(exit_code: int, text: str) -> Verdict:
    """The verdict in what `sbatch --test-only` prints on stderr, with times in seconds."""
    estimate = _ESTIMATE.search(text)
    return Verdict(
        accepted=exit_code == 0,
        words=scheduler_words(text),
        starts_at=_time(estimate[1]) if estimate else None,
        nodes=expand_hostlist(estimate[2] or "") if estimate else (),
    )


_PREFIX = re.compile(
    r"^(?:(?:sbatch|squeue|sinfo|scancel|sacct|slurm_\w+)(?: error)?: )?(?:error: |fatal: )?"
    r"(?:Batch job submission failed: |allocation failure: )?"
)


def scheduler_words(text: str) -> str:
    """What a command said, in one line, without the name of the command."""
    return "; ".join(dict.fromkeys(_words(text)))


def _words(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if words := _PREFIX.sub("", line.strip()).strip():
            yield words


_OUTAGE = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted|connect failure|"
    r"[Cc]onnection refused|standby mode|temporarily unable|authentication error|Munge|configuration source|"
    r"communication (?:connection )?failure|Unable to establish",
)


def is_outage(text: str) -> bool:
    """Whether a command failed because the scheduler does not answer, and not because of what was asked."""
    return _OUTAGE.search(text) is not None
