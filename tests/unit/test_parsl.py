"""Jobs of other schedulers than Slurm, through Parsl's providers: with commands that print recorded output, and with
Parsl's local provider for real."""

from __future__ import annotations

import asyncio
import os
import shlex
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest
from parsl.providers import LocalProvider
from parsl.providers.cluster_provider import ClusterProvider

from rhapsody_mcp.model.errors import InvalidRequest, SchedulerRefusal, SchedulerUnavailable
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.schedulers.allocation import current_allocation
from rhapsody_mcp.schedulers.base import AllocationRequest, JobState
from rhapsody_mcp.schedulers.detection import choose_scheduler, describe_scheduler
from rhapsody_mcp.schedulers.parsl_kinds import GRID_ENGINE, LSF, PBS_PRO, TORQUE, ParslKind
from rhapsody_mcp.schedulers.parsl_providers import ParslScheduler
from rhapsody_mcp.settings import Settings

pytestmark = pytest.mark.anyio

SCRIPT = "#!/bin/bash -l\necho a secret\n"
REQUEST = AllocationRequest(nodes=2, minutes=90, job_name="rhapsody-1a2b3c4d")
PBS_JOB = """\
{
    "timestamp":1479277336,
    "pbs_version":"14.1",
    "pbs_server":"vbox",
    "Jobs":{
        "1.vbox":{
            "Job_Name":"STDIN",
            "Job_Owner":"root@vbox",
            "job_state":"%s",
            "queue":"workq",
            "server":"vbox"
        }
    }
}
"""
"""Of the design document of `qstat -F json`, PP-483 in the wiki of PBS Pro, cut to five attributes."""
TORQUE_JOB = """\
Job id                    Name             User            Time Use S Queue
------------------------- ---------------- --------------- -------- - -----
0.marvelvm                run.sh           vagrant                0 %s batch
"""
"""Of marvel-nccr/quantum-mobile issue 20."""
GRID_ENGINE_JOB = """\
job-ID  prior   name       user         state submit/start at     queue                          slots ja-task-ID
-----------------------------------------------------------------------------------------------------------------
  23194 0.25007 rhapsody-1 flengyel     %s     07/07/2009 14:14:40 x86_64.q@m49.gc.cuny.edu           4
       Full jobname:     rhapsody-1a2b3c4d
       Master queue:     x86_64.q@m49.gc.cuny.edu
       Requested PE:     ompi 4
"""
"""Of `qstat -r` in a message to the users' list of Open MPI in July 2009, with the name of our job."""
GRID_ENGINE_QUEUE = "".join(GRID_ENGINE_JOB.splitlines(keepends=True)[:3])
"""What `qstat` prints without -r."""


class StandIn:
    """Commands that print recorded output, and keep a copy of the job script and of their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "commands"
        self.folder.mkdir()
        self.environment = {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}

    def answer(self, command: str, stdout: str = "", stderr: str = "", exit_code: int = 0) -> None:
        """What the command says from now on."""
        keep = f'echo "$@" >{self.folder}/{command}.arguments'
        copy = f'for last; do :; done; [ -f "$last" ] && cat "$last" >{self.folder}/script || [ -t 0 ] || cat'
        says = [f"printf %s {shlex.quote(stdout)}", f"printf %s {shlex.quote(stderr)} >&2", f"exit {exit_code}"]
        read = f"{copy} >>{self.folder}/script" if command in ("qsub", "bsub") else ":"
        self._write(command, [keep, read, *says])

    def hang(self, command: str) -> None:
        self._write(command, ["exec sleep 3600"])

    def _write(self, command: str, lines: list[str]) -> None:
        file = self.folder / command
        file.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        file.chmod(0o755)

    def arguments(self, command: str) -> str:
        return (self.folder / f"{command}.arguments").read_text().strip()

    @property
    def script(self) -> list[str]:
        return (self.folder / "script").read_text().splitlines()

    def options(self, prefix: str) -> list[str]:
        """The options in the job script, but for the files that the scheduler writes."""
        options = [line.removeprefix(prefix) for line in self.script if line.startswith(prefix)]
        return sorted(option for option in options if not option.startswith(("-o ", "-e ", "-m n", "-S /bin/bash")))


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "session"
    folder.mkdir()
    return folder / "pilot.log"


# --- what is submitted

SUBMISSIONS = {
    "pbs": (PBS_PRO, "qsub", "484874.s034-lcam\n", "484874.s034-lcam"),
    "torque": (TORQUE, "qsub", "0.marvelvm\n", "0.marvelvm"),
    "lsf": (LSF, "bsub", "Job <1815> is submitted to default queue <normal>.\n", "1815"),
    "grid-engine": (GRID_ENGINE, "qsub", "23194\n", "23194"),
}
"""What the commands print of a new job: as in Parsl's code, and the words of LSF as in IBM's command reference."""
OPTIONS: Mapping[str, list[str]] = {
    "pbs": [
        "-A m1234",
        "-N rhapsody-1a2b3c4d",
        "-l place=scatter:excl",
        "-l select=2:ncpus=1:ngpus=4",
        "-l walltime=01:30:00",
        "-q gpu",
        "-r n",
    ],
    "torque": [
        "-A m1234",
        "-N rhapsody-1a2b3c4d",
        "-l nodes=2:ppn=1:gpus=4",
        "-l walltime=01:30:00",
        "-n",
        "-q gpu",
        "-r n",
    ],
    "lsf": [
        "-J rhapsody-1a2b3c4d",
        "-P m1234",
        "-W 90",
        "-gpu num=4",
        '-n 2 -R "span[ptile=1]"',
        "-q gpu",
        "-rn",
        "-x",
    ],
    "grid-engine": [
        "-N rhapsody-1a2b3c4d",
        "-P m1234",
        "-cwd",
        "-l gpu=4",
        "-l h_rt=01:30:00",
        "-pe mpi 32",
        "-q gpu",
        "-r n",
    ],
}


def wide(name: str) -> AllocationRequest:
    """A request with what the scheduler has words for."""
    chosen: dict[str, Any] = {"partition": "gpu", "account": "m1234", "gpus_per_node": 4}
    if name == "grid-engine":
        chosen["lines"] = ("-pe mpi 32", "-l gpu=4")
    return AllocationRequest(nodes=2, minutes=90, job_name=REQUEST.job_name, **chosen)


@pytest.mark.parametrize("name", SUBMISSIONS)
async def test_a_job_is_submitted_with_its_options_and_its_script_is_private(
    name: str, stand_in: StandIn, log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, command, says, job = SUBMISSIONS[name]
    stand_in.answer(command, says)
    assert await ParslScheduler(kind, stand_in.environment).submit(wide(name), SCRIPT, log) == job
    assert stand_in.options(kind.prefix) == sorted(OPTIONS[name])
    (script,) = log.parent.glob("scheduler/*.job")
    assert script.read_text() == SCRIPT
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert f"cd {log.parent} && exec {script} >>{log} 2>&1" in stand_in.script
    assert "secret" not in "".join(stand_in.script)
    assert sorted(os.listdir(tmp_path)) == ["commands", "session"]


async def test_an_option_in_lines_takes_the_place_of_the_same_option(stand_in: StandIn, log: Path) -> None:
    stand_in.answer("qsub", "1.vbox\n")
    lines = ("-l select={nodes}:ncpus=64:ngpus=4", "-l filesystems=home:eagle", "-l place=scatter", "-q debug")
    request = AllocationRequest(nodes=2, minutes=5, partition="gpu", gpus_per_node=2, lines=lines)
    await ParslScheduler(PBS_PRO, stand_in.environment).submit(request, SCRIPT, log)
    kept = ["-l select=2:ncpus=64:ngpus=4", *lines[1:], "-N rhapsody-mcp", "-l walltime=00:05:00", "-r n"]
    assert stand_in.options("#PBS ") == sorted(kept)


async def test_nodes_of_lsf_can_be_asked_for_by_nnodes(stand_in: StandIn, log: Path) -> None:
    stand_in.answer("bsub", "Job <1815> is submitted to queue <batch>.\n")
    request = AllocationRequest(nodes=2, minutes=5, lines=("-nnodes {nodes}",))
    await ParslScheduler(LSF, stand_in.environment).submit(request, SCRIPT, log)
    assert stand_in.options("#BSUB ") == ["-J rhapsody-mcp", "-W 5", "-nnodes 2", "-rn", "-x"]


REFUSED: list[tuple[ParslKind, dict[str, Any], str, str]] = [
    (PBS_PRO, {"qos": "high"}, "qos", r"PBS Pro has no qos here: use lines in its place, as in lines=\['-q QUEUE'\]"),
    (PBS_PRO, {"constraint": "a100"}, "constraint", r"lines=\['-l select=NODES:ncpus=CORES:FEATURE=true'\]"),
    (TORQUE, {"reservation": "r1"}, "reservation", r"lines=\['-l advres=RESERVATION'\]"),
    (LSF, {"qos": "high"}, "qos", r"lines=\['-sla CLASS'\]"),
    (LSF, {"signal_s": 60}, "signal_s", "LSF has no signal_s here"),
    (GRID_ENGINE, {"nodes": 2}, "nodes", r"lines=\['-pe ENVIRONMENT SLOTS'\]"),
    (GRID_ENGINE, {"gpus_per_node": 1}, "gpus_per_node", r"lines=\['-l gpu=NUMBER'\]"),
    (PBS_PRO, {"lines": ("-J 0-9",)}, "lines", "valid is any option of PBS Pro but -J"),
    (PBS_PRO, {"lines": ("-W block=true",)}, "lines", "cannot be given to the scheduler"),
    (PBS_PRO, {"lines": ("-q a\ntouch x",)}, "lines", "valid is one line"),
    (LSF, {"partition": "a\ntouch x"}, "partition", "valid is one word"),
]


@pytest.mark.parametrize(("kind", "fields", "field", "words"), REFUSED)
async def test_what_the_scheduler_has_no_word_for_is_refused_before_a_submission(
    kind: ParslKind, fields: dict[str, Any], field: str, words: str
) -> None:
    request = AllocationRequest(**{"nodes": 1, "minutes": 5, **fields})
    with pytest.raises(InvalidRequest, match=words) as caught:
        await ParslScheduler(kind, {}).check(request, SCRIPT)
    assert caught.value.field == field


async def test_a_request_that_cannot_be_checked_is_no_verdict() -> None:
    verdict = await ParslScheduler(PBS_PRO, {}).check(REQUEST, SCRIPT)
    assert (verdict.accepted, verdict.is_asked, verdict.starts_at) == (True, False, None)
    assert "PBS Pro cannot be asked without submitting the job" in verdict.words


async def test_a_folder_that_parsl_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchedulerRefusal, match="start the service with a state folder"):
        await ParslScheduler(PBS_PRO, {}).submit(REQUEST, SCRIPT, tmp_path / "my session" / "log")


# --- refusals and outages

REFUSALS = [
    (PBS_PRO, "qsub", "qsub: Unknown queue\n", 170, "PBS Pro refused the job: Unknown queue"),
    (
        TORQUE,
        "qsub",
        "qsub: PBS: Job rejected by all possible destinations (check syntax)\n",
        1,
        "PBS: Job rejected by all",
    ),
    (LSF, "bsub", "nope: No such queue. Job not submitted.\n", 255, "LSF refused the job: nope: No such queue"),
    (
        GRID_ENGINE,
        "qsub",
        'Unable to run job: job rejected: the requested parallel environment "smp" does not exist.\nExiting.\n',
        1,
        "Grid Engine refused the job: job rejected: the requested parallel environment",
    ),
]
"""PBS Pro: tests of CrayLabs/SmartSim; Torque: adaptivecomputing/torque issue 312, shortened; LSF: tests of
equinor/ert; Grid Engine: cooperative-computing-lab/cctools issue 2060."""


@pytest.mark.parametrize(("kind", "command", "stderr", "code", "words"), REFUSALS)
async def test_a_refusal_has_the_schedulers_words(
    kind: ParslKind, command: str, stderr: str, code: int, words: str, stand_in: StandIn, log: Path
) -> None:
    stand_in.answer(command, stderr=stderr, exit_code=code)
    request = AllocationRequest(nodes=1, minutes=5)
    with pytest.raises(SchedulerRefusal, match=words):
        await ParslScheduler(kind, stand_in.environment).submit(request, SCRIPT, log)
    assert not list(log.parent.glob("scheduler/*.job")), "the script of a job that does not exist"


OUTAGES = [
    (PBS_PRO, "q", "Connection refused\nqsub: cannot connect to server s034-lc (errno=15010)\n", 162),
    (PBS_PRO, "q", "qsub: Invalid credential\n", 171),
    (TORQUE, "q", "qstat: cannot connect to server mskcc-fe1.local (errno=111) Connection refused\n", 111),
    (LSF, "b", "LSF is down. Please wait ...\n", 255),
    (GRID_ENGINE, "q", "error: commlib error: got select error (Connection refused)\n", 1),
]
"""PBS Pro: equinor/ert issue 7103; Torque: cBio/cbio-cluster issue 178; Grid Engine: a page on its errors."""


@pytest.mark.parametrize(("kind", "first", "stderr", "code"), OUTAGES)
async def test_a_scheduler_that_does_not_answer_is_no_refusal_and_no_end_of_a_job(
    kind: ParslKind, first: str, stderr: str, code: int, stand_in: StandIn, log: Path
) -> None:
    for command in ("sub", "stat", "del", "select", "jobs", "kill"):
        stand_in.answer(first + command, stderr=stderr, exit_code=code)
    scheduler = ParslScheduler(kind, stand_in.environment)
    request = AllocationRequest(nodes=1, minutes=5)
    for call in (scheduler.submit(request, SCRIPT, log), scheduler.status(["1"]), scheduler.find_jobs("r")):
        with pytest.raises(SchedulerUnavailable, match=f"{kind.title} does not answer"):
            await call
    with pytest.raises(SchedulerUnavailable):
        await scheduler.cancel("1")
    assert list(log.parent.glob("scheduler/*.job")), "the job may have been taken"


async def test_a_submission_without_an_id_may_be_a_job(stand_in: StandIn, log: Path) -> None:
    stand_in.answer("bsub", "Thank you.\n")
    with pytest.raises(SchedulerUnavailable, match="LSF gave no job id: Thank you"):
        await ParslScheduler(LSF, stand_in.environment).submit(REQUEST, SCRIPT, log)


async def test_a_command_that_hangs_is_given_up(stand_in: StandIn, log: Path) -> None:
    stand_in.hang("qsub")
    stand_in.hang("qstat")
    scheduler = ParslScheduler(PBS_PRO, stand_in.environment, timeout_s=0.3)
    with pytest.raises(SchedulerUnavailable, match=r"qsub gave no answer within 0.3 s"):
        await scheduler.submit(REQUEST, SCRIPT, log)
    with pytest.raises(SchedulerUnavailable, match=r"qstat gave no answer within 0.3 s"):
        await scheduler.status(["1.vbox"])


@pytest.mark.parametrize("interrupted", [False, True])
async def test_the_command_of_a_call_that_is_canceled_ends(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Also where the thread that waits for the command has not been told of it."""
    started, alive = tmp_path / "started", tmp_path / "alive"
    os.mkfifo(started)
    os.mkfifo(alive)
    (stand_in.folder / "qstat").write_text(f"#!/bin/sh\nexec 3>{alive}; echo >{started}; sleep 1000 & wait\n")
    (stand_in.folder / "qstat").chmod(0o755)
    scheduler = ParslScheduler(PBS_PRO, stand_in.environment)
    may_go_on = threading.Event()
    if interrupted:
        start = asyncio.run_coroutine_threadsafe

        def interrupt(*arguments: Any) -> Any:
            future = start(*arguments)
            may_go_on.wait(60)
            return future

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupt)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, alive.read_bytes)
            async with anyio.create_task_group() as call:
                call.start_soon(scheduler.status, ["1.vbox"])
                await anyio.to_thread.run_sync(started.read_bytes)
                call.cancel_scope.cancel()
    may_go_on.set()


# --- jobs

STATES = [
    (PBS_PRO, "1.vbox", "qstat", PBS_JOB % "Q", JobState.PENDING, "PENDING"),
    (PBS_PRO, "1.vbox", "qstat", PBS_JOB % "H", JobState.PENDING, "HELD, held, suspended or in error"),
    (PBS_PRO, "1.vbox", "qstat", PBS_JOB % "R", JobState.RUNNING, "RUNNING"),
    (PBS_PRO, "1.vbox", "qstat", PBS_JOB % "F", JobState.ENDED, "ENDED, the job has left the queue; whether"),
    (TORQUE, "0.marvelvm", "qstat", TORQUE_JOB % "Q", JobState.PENDING, "PENDING"),
    (TORQUE, "0.marvelvm", "qstat", TORQUE_JOB % "R", JobState.RUNNING, "RUNNING"),
    (TORQUE, "0.marvelvm", "qstat", TORQUE_JOB % "C", JobState.ENDED, "ENDED, the job has left the queue; whether"),
    (LSF, "111", "bjobs", "111 PEND\n", JobState.PENDING, "PENDING"),
    (LSF, "111", "bjobs", "111 PSUSP\n", JobState.PENDING, "HELD"),
    (LSF, "111", "bjobs", "111 UNKWN\n", JobState.RUNNING, "RUNNING"),
    (LSF, "111", "bjobs", "111 RUN\n", JobState.RUNNING, "RUNNING"),
    (LSF, "111", "bjobs", "111 DONE\n", JobState.ENDED, "ENDED"),
    (LSF, "111", "bjobs", "111 EXIT\n", JobState.ENDED, "FAILED, the job script failed, or the job was killed"),
    (GRID_ENGINE, "23194", "qstat", GRID_ENGINE_QUEUE % "qw", JobState.PENDING, "PENDING"),
    (GRID_ENGINE, "23194", "qstat", GRID_ENGINE_QUEUE % "t", JobState.PENDING, "PENDING"),
    (GRID_ENGINE, "23194", "qstat", GRID_ENGINE_QUEUE % "r", JobState.RUNNING, "RUNNING"),
    (GRID_ENGINE, "23194", "qstat", GRID_ENGINE_QUEUE % "Eqw", JobState.PENDING, "HELD, held, suspended or in error"),
    (GRID_ENGINE, "23195", "qstat", GRID_ENGINE_QUEUE % "r", JobState.ENDED, "ENDED, the job has left the queue"),
]
"""The columns of bjobs are those that Parsl asks for; the states are those of IBM's page "About job states"."""


@pytest.mark.parametrize(("kind", "job", "command", "says", "state", "words"), STATES)
async def test_the_state_of_a_job_is_told_and_no_end_claims_success(
    kind: ParslKind, job: str, command: str, says: str, state: JobState, words: str, stand_in: StandIn
) -> None:
    stand_in.answer(command, says)
    status = (await ParslScheduler(kind, stand_in.environment).status([job]))[job]
    assert status.state is state
    assert status.words.startswith(words)


FORGOTTEN = [
    (PBS_PRO, "qstat", "qdel", "qstat: Unknown Job Id 900.m2\n", 153),
    (TORQUE, "qstat", "qdel", "qstat: Unknown Job Id Error 3481331.egeon2\n", 153),
    (LSF, "bjobs", "bkill", "Job <123> is not found\n", 255),
    (LSF, "bjobs", "bkill", "Job <123> is not found\n", 0),
]
"""LSF: IBM's page on LSB_BJOBS_CONSISTENT_EXIT_CODE; Torque: adaptivecomputing/torque issue 312."""


@pytest.mark.parametrize(("kind", "listing", "ending", "stderr", "code"), FORGOTTEN)
async def test_a_job_that_the_scheduler_has_forgotten_is_unknown_and_not_failed(
    kind: ParslKind, listing: str, ending: str, stderr: str, code: int, stand_in: StandIn
) -> None:
    stand_in.answer(listing, stderr=stderr, exit_code=code)
    stand_in.answer(ending, stderr=stderr, exit_code=code)
    scheduler = ParslScheduler(kind, stand_in.environment)
    assert (await scheduler.status(["123"]))["123"].state is JobState.UNKNOWN
    await scheduler.cancel("123")


async def test_a_new_job_that_is_not_listed_yet_is_pending(stand_in: StandIn, log: Path) -> None:
    stand_in.answer("bsub", "Job <123> is submitted to default queue <normal>.\n")
    stand_in.answer("bjobs", stderr="Job <123> is not found\n", exit_code=255)
    scheduler = ParslScheduler(LSF, stand_in.environment)
    assert await scheduler.submit(REQUEST, SCRIPT, log) == "123"
    status = (await scheduler.status(["123"]))["123"]
    assert (status.state, status.words) == (JobState.PENDING, "PENDING, not listed yet")


async def test_the_script_of_a_job_is_deleted_at_the_end_of_the_job(stand_in: StandIn, log: Path) -> None:
    stand_in.answer("qsub", "1.vbox\n")
    scheduler = ParslScheduler(PBS_PRO, stand_in.environment)
    await scheduler.submit(REQUEST, SCRIPT, log)
    for state, count in (("R", 1), ("F", 0)):
        stand_in.answer("qstat", PBS_JOB % state)
        await scheduler.status(["1.vbox"])
        assert len(list(log.parent.glob("scheduler/*.job"))) == count


ENDINGS = [
    (PBS_PRO, "qdel", "", "", 0),
    (PBS_PRO, "qdel", "", "qdel: Job has finished 484874.s034-lcam\n", 35),
    (PBS_PRO, "qdel", "", "qdel: Request invalid for state of job 486044.s034-lcam\n", 168),
    (LSF, "bkill", "Job <11> is being terminated\n", "", 0),
    (LSF, "bkill", "", "Job <11>: Job has already finished\n", 255),
    (LSF, "bkill", "", "Job <22>: No matching job found\n", 255),
    (GRID_ENGINE, "qdel", 'denied: job "23194" does not exist\n', "", 1),
]
"""PBS Pro: equinor/ert issue 7103; LSF: the tests of equinor/ert; Grid Engine: MathWorks' plugin for it."""


@pytest.mark.parametrize(("kind", "command", "stdout", "stderr", "code"), ENDINGS)
async def test_a_job_is_canceled_and_one_that_has_ended_is_left_alone(
    kind: ParslKind, command: str, stdout: str, stderr: str, code: int, stand_in: StandIn
) -> None:
    stand_in.answer(command, stdout, stderr, code)
    await ParslScheduler(kind, stand_in.environment).cancel("11")
    assert stand_in.arguments(command) == "11"


async def test_a_job_that_may_not_be_canceled_is_told(stand_in: StandIn) -> None:
    stand_in.answer("qdel", stderr="qdel: Unauthorized Request 1.vbox\n", exit_code=159)
    with pytest.raises(SchedulerRefusal, match=r"did not cancel job 1.vbox: Unauthorized Request"):
        await ParslScheduler(PBS_PRO, stand_in.environment).cancel("1.vbox")


@pytest.mark.parametrize(
    ("kind", "command", "says", "jobs"),
    [
        (PBS_PRO, "qselect", "1.vbox\n", ["1.vbox"]),
        (PBS_PRO, "qselect", "", []),
        (TORQUE, "qselect", "0.marvelvm\n", ["0.marvelvm"]),
        (LSF, "bjobs", "111\n", ["111"]),
        (GRID_ENGINE, "qstat", GRID_ENGINE_JOB % "r", ["23194"]),
        (GRID_ENGINE, "qstat", "", []),
    ],
)
async def test_jobs_are_found_by_their_name(
    kind: ParslKind, command: str, says: str, jobs: list[str], stand_in: StandIn
) -> None:
    stand_in.answer(command, says)
    assert await ParslScheduler(kind, stand_in.environment).find_jobs(REQUEST.job_name) == jobs


async def test_no_job_of_lsf_with_a_name_is_no_outage(stand_in: StandIn) -> None:
    stand_in.answer("bjobs", stderr="Job <rhapsody-1a2b3c4d> is not found\n", exit_code=255)
    assert await ParslScheduler(LSF, stand_in.environment).find_jobs(REQUEST.job_name) == []


# --- which scheduler there is


@pytest.mark.parametrize(
    ("command", "version", "says", "variables", "name", "told"),
    [
        ("qsub", "qstat", "pbs_version = 19.0.0\n", {}, "pbs", "PBS Pro 19.0.0"),
        ("qsub", "qstat", "Version: 6.1.2\n", {}, "torque", "Torque 6.1.2"),
        (
            "qsub",
            "qstat",
            "SGE 8.1.9\nusage: qstat [options]\n",
            {"SGE_ROOT": "/sge"},
            "grid-engine",
            "Grid Engine 8.1.9",
        ),
        ("bsub", "bsub", "IBM Spectrum LSF Standard 10.1.0.6, Oct 10 2019\n", {}, "lsf", "LSF 10.1.0.6"),
    ],
)
async def test_the_scheduler_of_a_machine_is_found_by_its_commands(
    command: str, version: str, says: str, variables: dict[str, str], name: str, told: str, stand_in: StandIn
) -> None:
    stand_in.answer(command)
    stand_in.answer(version, says)
    described = await describe_scheduler({**variables, "PATH": str(stand_in.folder)})
    assert (described.name, described.version, described.partitions, described.problem) == (name, told, (), "")


async def test_a_scheduler_without_parsl_says_what_to_install(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.answer("qsub")
    stand_in.answer("qstat", "pbs_version = 19.0.0\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = choose_scheduler({"PATH": str(stand_in.folder)})
    words = "PBS Pro was found; its support needs the extra: pip install 'rhapsody-mcp[parsl]'"
    assert (found.scheduler, found.problem) == (None, words)


async def test_condor_is_told_apart_from_no_scheduler(stand_in: StandIn) -> None:
    stand_in.answer("condor_submit")
    found = choose_scheduler({"PATH": str(stand_in.folder)})
    assert found.scheduler is None
    assert found.problem.startswith("HTCondor was found")


async def test_dragon_is_not_planned_over_nodes_of_another_scheduler(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.answer("bsub")
    monkeypatch.setenv("PATH", str(stand_in.folder))
    (plan, *_) = plan_backends(SessionConfig(nodes=2), Settings())
    assert plan.name == "local"
    with pytest.raises(InvalidRequest, match=r"in jobs of Slurm alone: give the local backend"):
        plan_backends(SessionConfig(nodes=2, backends=("dragon",)), Settings())


# --- allocations


def test_the_allocation_of_an_lsf_job_is_read_from_its_file_or_its_variable(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a1\na1\na2\na2\n")
    variables = {"LSB_JOBID": "1815", "LSB_MCPU_HOSTS": "b1 16 b2 16 ", "CUDA_VISIBLE_DEVICES": "0,1"}
    allocation = current_allocation({**variables, "LSB_DJOB_HOSTFILE": str(hosts)})
    assert allocation is not None
    assert (allocation.scheduler, allocation.job_id, allocation.nodes) == ("lsf", "1815", ("a1", "a2"))
    assert allocation.gpus_per_node == 2
    allocation = current_allocation(variables)
    assert allocation is not None and allocation.nodes == ("b1", "b2")
    assert current_allocation({"LSB_JOBID": "1815"}) is None


def test_a_torque_job_knows_its_end(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\nn2\n")
    os.utime(nodes, (1_000_000, 1_000_000))
    allocation = current_allocation({"PBS_NODEFILE": str(nodes), "PBS_JOBID": "0.marvelvm", "PBS_WALLTIME": "600"})
    assert allocation is not None and allocation.ends_at == 1_000_600


def test_the_allocation_of_a_grid_engine_job_is_read_from_its_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 16 all.q@n1 UNDEFINED\nn2 16 all.q@n2 UNDEFINED\n")
    allocation = current_allocation({"PE_HOSTFILE": str(hosts), "JOB_ID": "23194"})
    assert allocation is not None
    assert (allocation.scheduler, allocation.job_id, allocation.nodes) == ("grid-engine", "23194", ("n1", "n2"))


# --- for real


class LocalJobs(LocalProvider, ClusterProvider):  # type: ignore[misc]  # mypy does not read Parsl
    """Parsl's provider for processes of this machine, which remembers the jobs of earlier instances."""

    resources: dict[str, dict[str, Any]]
    known: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, *, launcher: Any, walltime: str = "", **arguments: Any) -> None:
        super().__init__(launcher=launcher, **arguments)

    def submit(self, *arguments: Any, **more: Any) -> Any:
        job = super().submit(*arguments, **more)
        self.known.update(self.resources)
        return job

    def status(self, job_ids: Any) -> Any:
        self.resources = {job: {**self.known[job], "status": self.resources[job]["status"]} for job in job_ids}
        return super().status(job_ids)

    def cancel(self, job_ids: Any) -> Any:
        self.resources = {job: self.known[job] for job in job_ids}
        return super().cancel(job_ids)

    def _status(self) -> None:
        raise NotImplementedError

    def _read_job_file(self, script_path: Any, suffix: str) -> Any:
        while not (text := super()._read_job_file(script_path, suffix)):
            time.sleep(0.01)  # a shell has made the file and has not written yet
        return text


LOCAL = ParslKind(
    name="local",
    title="This machine",
    provider=f"{__name__}:LocalJobs",
    prefix="#NO ",
    version="true",
    listing="true",
    listed="x",
)


def text_of(log: Path) -> str:
    return log.read_text()


async def until_over(scheduler: ParslScheduler, job: str) -> str:
    with anyio.fail_after(30):
        while (status := (await scheduler.status([job]))[job]).state is not JobState.ENDED:  # noqa: ASYNC110
            await anyio.sleep(0.05)  # the state of a job is no event
    return status.words


async def test_a_job_of_parsls_local_provider_runs_in_the_folder_of_its_log(log: Path) -> None:
    scheduler = ParslScheduler(LOCAL)
    request = AllocationRequest(nodes=1, minutes=1)
    for _ in range(2):
        job = await scheduler.submit(request, "#!/bin/bash -l\npwd; echo wrong >&2\n", log)
        assert (await until_over(scheduler, job)).startswith("ENDED")
    assert text_of(log) == f"{log.parent}\nwrong\n" * 2
    assert sorted(os.listdir(log.parent)) == ["pilot.log", "scheduler"]


async def test_a_failed_job_of_parsls_local_provider_has_its_exit_code(log: Path) -> None:
    scheduler = ParslScheduler(LOCAL)
    job = await scheduler.submit(AllocationRequest(nodes=1, minutes=1), "#!/bin/sh\nexit 3\n", log)
    assert (await until_over(scheduler, job)).startswith("FAILED")
    assert (await scheduler.status([job]))[job].exit_code == 3


async def test_a_job_of_parsls_local_provider_is_canceled(log: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    scheduler = ParslScheduler(LOCAL)
    job = await scheduler.submit(
        AllocationRequest(nodes=1, minutes=1), f"#!/bin/sh\necho >{started}\nexec sleep 1000\n", log
    )
    with anyio.fail_after(30):
        await anyio.to_thread.run_sync(started.read_bytes)
    assert (await scheduler.status([job]))[job].state is JobState.RUNNING
    await scheduler.cancel(job)
    assert (await until_over(scheduler, job)).startswith("CANCELLED")
