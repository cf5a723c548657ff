"""What both engines promise, through a session: the same tasks run on Dragon and on this machine's processes."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import (
    AITask,
    ComputeTask,
    Module,
    Part,
    Session,
    Source,
    TaskCanceled,
    TaskFailed,
    TaskState,
    Text,
)
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, UnknownName
from rhapsody_mcp.model.states import Cause
from tests.processes import FAMILY, dragon_files, family, wait_until

pytestmark = pytest.mark.anyio

PROCESS: dict[str, Any] = {"process_template": {}}
JOB: dict[str, Any] = {"process_templates": [(2, {}), (2, {"env": {"GROUP": "second"}})]}
MODES = {"native": {}, "process": PROCESS, "job": JOB}


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with Session([await request.param(num_workers=2)]) as session:
        yield session


async def run(session: Session, *tasks: ComputeTask) -> list[ComputeTask]:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)
    return list(tasks)


async def run_one(session: Session, task: ComputeTask) -> ComputeTask:
    return (await run(session, task))[0]


async def test_a_result_stands_in_the_text_of_an_argument(session: Session) -> None:
    rate, names = ComputeTask(float, args=("0.5",)), ComputeTask(list, args=("ab",))
    whole, part = Text("--lr=", rate, ":", names), Text(Part(names, "/1"), "\u00e9")
    plain = ComputeTask(executable="echo", arguments=[whole, part])
    ranks: dict[str, Any] = {"process_templates": [(2, {})]}
    job = ComputeTask(executable="echo", arguments=[whole], task_backend_specific_kwargs=ranks)
    await run(session, rate, names, plain, job)
    assert plain.return_value == '--lr=0.5:["a","b"] b\u00e9'
    assert [rank.stdout for rank in job.ranks] == ['--lr=0.5:["a","b"]\n'] * 2


@pytest.mark.parametrize("backend", [DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def test_tasks_start_in_the_work_dir_of_their_session(
    backend: Callable[..., DragonExecutionBackendV3 | LocalExecutionBackend], tmp_path: Path
) -> None:
    folder, here = tmp_path / "new", tmp_path / "here"
    here.mkdir()
    async with Session([backend(num_workers=1)], uid="mine", work_dir=folder) as session:
        own = ComputeTask(executable="pwd", task_backend_specific_kwargs={"process_template": {"cwd": str(here)}})
        tasks = await run(session, ComputeTask(os.getcwd), ComputeTask(executable="pwd"), own)
        assert [task.return_value for task in tasks] == [str(folder), str(folder), str(here)]
        assert (session.uid, session.work_dir) == ("mine", str(folder))
        with pytest.raises(InvalidRequest, match="has started, and its tasks start in"):
            Session(session.backends, work_dir=here)


# --- the functions that tasks run; imports inside, because only the function travels


def identity(value: Any) -> Any:
    return value


async def where() -> tuple[int, str]:
    import asyncio
    import os

    await asyncio.sleep(0)
    return os.getpid(), os.environ.get("GROUP", "")


def speak() -> str:
    import os
    import sys

    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.system("echo from a child")
    return "spoken"


def raise_error() -> None:
    raise ValueError("seven is not prime enough")


def leave() -> None:
    import os

    os._exit(7)


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def out_of_memory() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does


def unpicklable() -> Any:
    import threading

    return threading.Lock()


def exit_system() -> None:
    raise SystemExit("stop here")


def sleep_with_children(path: str) -> None:
    """Starts a child, and a grandchild that leaves its session; says when all are there."""
    import os
    import subprocess
    import time

    subprocess.Popen(["sh", "-c", "setsid sleep 300 & sleep 300"], start_new_session=True)
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(300)


def ignores_interrupts(path: str) -> None:
    import time

    with open(path, "w") as file:
        file.write("started")
    while True:
        try:
            time.sleep(300)
        except BaseException:
            pass


# --- values


@pytest.mark.parametrize("mode", MODES)
async def test_a_function_gives_its_value_in_every_mode(session: Session, mode: str) -> None:
    task = await run_one(
        session, ComputeTask(identity, args=([1, {"a": None}],), task_backend_specific_kwargs=MODES[mode])
    )
    assert (task.state, task.return_value) == (TaskState.DONE, [1, {"a": None}])


@pytest.mark.parametrize("value", [None, (1, 2), {3: "x"}, float("inf"), 2**100, {1, 2}, b"\0", "\udcff", -0.0, [[]]])
async def test_a_value_comes_back_as_what_it_was(session: Session, value: Any) -> None:
    task = await run_one(session, ComputeTask(identity, args=(value,)))
    assert task.return_value == value
    assert type(task.return_value) is type(value)


@pytest.mark.parametrize("mode", ["native", "process"])
async def test_a_value_of_100_megabytes_comes_back_whole(session: Session, mode: str) -> None:
    def big() -> bytes:
        return bytes(range(256)) * 400_000

    task = await run_one(session, ComputeTask(big, task_backend_specific_kwargs=MODES[mode]))
    assert len(task.return_value) == 102_400_000
    assert task.return_value[-256:] == bytes(range(256))


async def test_every_rank_of_a_job_has_its_own_value_process_and_environment(session: Session) -> None:
    task = await run_one(session, ComputeTask(where, task_backend_specific_kwargs=JOB))
    assert [rank.return_value[1] for rank in task.ranks] == ["", "", "second", "second"]
    assert len({rank.pid for rank in task.ranks}) == 4
    assert [rank.return_value[0] for rank in task.ranks] == [rank.pid for rank in task.ranks]
    assert task.return_value == task.ranks[0].return_value
    cores = len(os.sched_getaffinity(0))
    assert bool(task.notes) == (cores < 4)
    assert all("oversubscribed" in note for note in task.notes)


async def test_a_job_runs_with_more_ranks_than_cores_and_says_so(session: Session) -> None:
    ranks = 3 * len(os.sched_getaffinity(0))
    kwargs: dict[str, Any] = {"process_templates": [(ranks, {})]}
    task = await run_one(session, ComputeTask(executable="true", task_backend_specific_kwargs=kwargs))
    assert (task.state, len(task.ranks)) == (TaskState.DONE, ranks)
    assert task.notes[0].startswith(f"oversubscribed: {ranks} ranks")


async def test_a_template_gives_a_process_its_environment_and_folder(session: Session, tmp_path: Path) -> None:
    template = {"env": {"COLOR": "green", "HOME": None}, "cwd": str(tmp_path), "policy": {"cpu_affinity": [0]}}
    command = 'echo "$COLOR-${HOME-unset}" $(pwd) $(nproc)'
    task = ComputeTask(
        executable="sh", arguments=["-c", command], task_backend_specific_kwargs={"process_template": template}
    )
    await run(session, task)
    assert task.return_value == f"green-unset {tmp_path} 1"


@pytest.mark.parametrize("mode", MODES)
async def test_output_is_kept_apart_for_every_task_and_rank(session: Session, mode: str) -> None:
    first, silent = await run(
        session,
        ComputeTask(speak, task_backend_specific_kwargs=MODES[mode]),
        ComputeTask(identity, args=(1,), task_backend_specific_kwargs=MODES[mode]),
    )
    assert sorted((first.stdout or "").split("\n")) == ["", "from a child", "to stdout"]
    assert first.stderr == "to stderr\n"
    assert silent.stdout == ""
    assert [rank.stderr for rank in first.ranks] == ["to stderr\n"] * (4 if mode == "job" else 0)


async def test_output_of_megabytes_is_kept_whole(session: Session) -> None:
    task = ComputeTask(executable="sh", arguments=["-c", "yes 0123456789 | head -n 200000"])
    await run(session, task)
    assert len(task.stdout or "") == 2_200_000
    assert len(task.return_value) == 2_200_000 - 1


async def test_output_that_is_no_text_comes_back_as_bytes(session: Session) -> None:
    task = ComputeTask(executable="sh", arguments=["-c", r"printf 'a\377\376 '"])
    user = ComputeTask(identity, args=(task,))
    await run(session, task, user)
    assert task.return_value == user.return_value == b"a\xff\xfe "
    assert task.stdout == "a\ufffd\ufffd "


async def test_a_function_that_reads_its_standard_input_finds_its_end(session: Session) -> None:
    def ask() -> str:
        return input("?")

    task = await run_one(session, ComputeTask(ask))
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.ERROR)
    assert "EOFError" in str(task.exception)


async def test_more_ranks_than_a_machine_can_hold_are_refused_at_submission(session: Session) -> None:
    task = ComputeTask(executable="true", task_backend_specific_kwargs={"process_templates": [(100_000, {})]})
    with pytest.raises(InvalidTask, match="100000 ranks are too many"):
        await session.submit_tasks([task])


async def test_more_ranks_than_ranks_per_node_allows_are_refused_at_submission(session: Session) -> None:
    layout = {"process_templates": [(3, {})], "ranks_per_node": 2}
    with pytest.raises(InvalidTask, match="3 ranks with ranks_per_node 2 need 2 nodes, and this engine has 1"):
        await session.submit_tasks([ComputeTask(executable="true", task_backend_specific_kwargs=layout)])


async def test_a_program_is_found_by_path_by_name_and_has_its_exit_code(session: Session) -> None:
    by_path, by_name, failing = await run(
        session,
        ComputeTask(executable="/bin/echo", arguments=["a", 1, 2.5]),
        ComputeTask(executable="echo", arguments=["b"], task_backend_specific_kwargs=PROCESS),
        ComputeTask(executable="sh", arguments=["-c", "echo half; echo it broke >&2; exit 3"]),
    )
    assert (by_path.return_value, by_name.return_value) == ("a 1 2.5", "b")
    assert (by_name.exit_code, by_name.stdout) == (0, "b\n")
    assert (failing.state, failing.exit_code, failing.cause) == (TaskState.FAILED, 3, Cause.EXIT_CODE)
    assert failing.stdout == "half\n"
    assert "it broke" in str(failing.exception)


async def test_a_program_gets_the_signals_as_a_shell_leaves_them(session: Session) -> None:
    task = await run_one(session, ComputeTask(executable="sh", arguments=["-c", "yes | head -1"]))
    assert (task.return_value, task.stderr) == ("y", "")  # yes ends by SIGPIPE; where that is ignored it complains


async def test_a_program_is_a_dragon_process_where_it_has_a_template(session: Session) -> None:
    code = "import os; print(any(name.startswith('DRAGON_') for name in os.environ))"
    plain, placed = [
        ComputeTask(executable="python3", arguments=["-c", code], task_backend_specific_kwargs=kwargs)
        for kwargs in ({}, PROCESS)
    ]
    await run(session, plain, placed)
    on_dragon = isinstance(session.backends[0], DragonExecutionBackendV3)
    assert (plain.return_value, placed.return_value) == ("False", str(on_dragon))


async def test_classes_and_closures_of_this_module_travel(session: Session) -> None:
    factor = 3

    class Box:
        def __init__(self, content: int) -> None:
            self.content = content

    def boxed(box: Box) -> Box:
        return Box(box.content * factor)

    task = await run_one(session, ComputeTask(boxed, args=(Box(14),)))
    assert isinstance(task.return_value, Box)
    assert task.return_value.content == 42


async def test_functions_come_as_source_and_by_import_path(session: Session) -> None:
    source = Source("import math\n\ndef area(radius):\n    return math.floor(math.pi * radius**2)\n")
    by_source, by_path, missing = await run(
        session,
        ComputeTask(source, args=(10,)),
        ComputeTask(Module("statistics:mean"), args=([1, 2, 6],)),
        ComputeTask(Module("statistics:meen"), args=([1, 2, 6],)),
    )
    assert (by_source.return_value, by_path.return_value) == (314, 3)
    assert (missing.state, missing.cause) == (TaskState.FAILED, Cause.INVALID)


async def test_tasks_feed_each_other_in_every_mode(session: Session) -> None:
    first = ComputeTask(identity, args=({"n": [1, 2, (3,)]},))
    second = ComputeTask(identity, args=([first, Part(first, "/n/1")],), task_backend_specific_kwargs=PROCESS)
    third = ComputeTask(executable="echo", arguments=[Part(first, "/n/0"), Part(second, "/0/n")])
    await run(session, third, second, first)
    assert second.return_value == [{"n": [1, 2, (3,)]}, 2]
    assert third.return_value == "1 [1,2,[3]]"


# --- failures: each alone, with its cause, and the next task runs


FAILURES: list[tuple[Callable[[], Any], Cause, str]] = [
    (raise_error, Cause.ERROR, "ValueError: seven is not prime enough"),
    (leave, Cause.CRASHED, "exit code 7"),
    (segfault, Cause.CRASHED, "SIGSEGV"),
    (out_of_memory, Cause.CRASHED, "SIGKILL"),
    (unpicklable, Cause.ERROR, "cannot be sent back"),
    (exit_system, Cause.ERROR, "stop here"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("function", "cause", "words"), FAILURES, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_failing_task_fails_alone_with_its_cause(
    session: Session, mode: str, function: Callable[[], Any], cause: Cause, words: str
) -> None:
    good = [ComputeTask(identity, args=(n,)) for n in range(8)]
    bad = ComputeTask(function, task_backend_specific_kwargs=MODES[mode])
    await run(session, *good[:4], bad, *good[4:])
    assert (bad.state, bad.cause) == (TaskState.FAILED, cause)
    assert words in str(bad.exception)
    assert [task.return_value for task in good] == list(range(8))
    with pytest.raises(TaskFailed, match=bad.uid):
        await bad


async def test_a_result_that_was_sent_survives_the_crash_of_the_next_task(session: Session) -> None:
    for _ in range(10):
        good, bad = await run(session, ComputeTask(identity, args=("kept",)), ComputeTask(leave))
        assert (good.return_value, bad.cause) == ("kept", Cause.CRASHED)


async def test_one_bad_rank_fails_the_job_and_is_named(session: Session) -> None:
    command = 'test "$RHAPSODY_RANK" != 2 || exit 5; echo rank $RHAPSODY_RANK of $RHAPSODY_RANKS'
    task = ComputeTask(executable="sh", arguments=["-c", command], task_backend_specific_kwargs=JOB)
    await run(session, task)
    assert (task.state, task.cause, task.exit_code) == (TaskState.FAILED, Cause.EXIT_CODE, 5)
    assert "rank 2 of 4" in str(task.exception)
    assert [rank.stdout for rank in task.ranks] == ["rank 0 of 4\n", "rank 1 of 4\n", "", "rank 3 of 4\n"]
    assert [rank.exit_code for rank in task.ranks] == [0, 0, 5, 0]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"executable": "/no/such/program"}, "does not exist"),
        ({"executable": "no-such-program"}, "on PATH"),
        ({"executable": "/etc/passwd"}, "chmod"),
        ({"function": Module("no_such_module:run")}, "No module named 'no_such_module'"),
        ({"function": Source("import no_such_module\ndef run(): pass")}, "No module named 'no_such_module'"),
        ({"executable": "true", "kwargs": {"policy": {"gpu_affinity": [63]}}}, "GPU 63"),
        ({"executable": "true", "kwargs": {"policy": {"cpu_affinity": [4095]}}}, "CPU 4095"),
        ({"executable": "true", "kwargs": {"policy": {"host_name": "elsewhere"}}}, "'elsewhere'"),
        ({"executable": "true", "kwargs": {"cwd": "/no/such/folder"}}, "/no/such/folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_only_the_node_knows_fails_as_invalid_before_user_code_runs(
    session: Session, task: dict[str, Any], words: str
) -> None:
    fields = dict(task)
    if template := fields.pop("kwargs", None):
        fields["task_backend_specific_kwargs"] = {"process_template": template}
    failed = await run_one(session, ComputeTask(**fields))
    assert (failed.state, failed.cause, failed.started) == (TaskState.FAILED, Cause.INVALID, None)
    assert words in str(failed.exception)


# --- time

TREE = "setsid sleep 300 & sleep 300 & touch {}; wait"


async def test_the_whole_tree_of_a_program_ends_with_its_time_and_on_request(session: Session, tmp_path: Path) -> None:
    def program(name: str, **kwargs: Any) -> ComputeTask:
        arguments = ["-c", TREE.format(tmp_path / name)]
        return ComputeTask(executable="sh", arguments=arguments, task_backend_specific_kwargs=kwargs)

    timed, canceled = program("timed", timeout=1.0), program("canceled")
    await session.submit_tasks([timed, canceled])
    await wait_until((tmp_path / "canceled").exists)
    await session.cancel(canceled)
    await session.wait_tasks([timed], timeout=600)
    assert (timed.cause, canceled.state) == (Cause.TIMEOUT, TaskState.CANCELED)
    assert not family("sleep", "300")


@pytest.mark.parametrize("mode", MODES)
async def test_a_task_whose_time_is_up_fails_and_its_whole_tree_ends(
    session: Session, mode: str, tmp_path: Path
) -> None:
    kwargs = {**MODES[mode], "timeout": 1.0}
    task = ComputeTask(sleep_with_children, args=(str(tmp_path / "up"),), task_backend_specific_kwargs=kwargs)
    await run(session, task)
    assert (task.state, task.cause) == (TaskState.FAILED, Cause.TIMEOUT)
    assert "1.0 s" in str(task.exception)
    assert not family("sleep", "300")
    assert (await run_one(session, ComputeTask(identity, args=(5,)))).return_value == 5


@pytest.mark.parametrize("mode", MODES)
async def test_cancel_ends_the_whole_process_tree_before_it_returns(
    session: Session, mode: str, tmp_path: Path
) -> None:
    path = tmp_path / "up"
    task = ComputeTask(sleep_with_children, args=(str(path),), task_backend_specific_kwargs=MODES[mode])
    await session.submit_tasks([task])
    await wait_until(path.exists)
    await session.cancel(task)
    assert task.state is TaskState.CANCELED
    assert not family("sleep", "300")
    with pytest.raises(TaskCanceled):
        await task


async def test_a_function_that_ignores_its_interrupt_is_canceled_all_the_same(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "up"
    task = ComputeTask(ignores_interrupts, args=(str(path),))
    await session.submit_tasks([task])
    await wait_until(path.exists)
    await asyncio.wait_for(session.cancel(task), 600)
    assert task.state is TaskState.CANCELED
    assert (await run_one(session, ComputeTask(identity, args=(6,)))).return_value == 6


async def test_tasks_that_wait_in_the_queue_are_canceled_without_having_run(session: Session, tmp_path: Path) -> None:
    blockers = [ComputeTask(ignores_interrupts, args=(str(tmp_path / str(n)),)) for n in range(2)]
    queued = [ComputeTask(identity, args=(n,)) for n in range(20)]
    process = [ComputeTask(executable="sleep", arguments=["300"]) for _ in range(5)]
    await session.submit_tasks(blockers)
    await wait_until(lambda: all((tmp_path / str(n)).exists() for n in range(2)))
    await session.submit_tasks([*queued, *process])
    await session.cancel([*queued, *process])
    assert {task.state for task in (*queued, *process)} == {TaskState.CANCELED}
    assert {task.started for task in queued} == {None}
    await session.cancel(blockers)


async def test_short_tasks_do_not_wait_behind_a_long_one_while_a_worker_is_free(
    session: Session, tmp_path: Path
) -> None:
    quick = [ComputeTask(identity, args=(n,)) for n in range(200)]
    await run(session, *quick)  # workers are now sent several at once
    long = ComputeTask(ignores_interrupts, args=(str(tmp_path / "long"),))
    more = [ComputeTask(identity, args=(n,)) for n in range(100)]
    await session.submit_tasks([long, *more])
    await session.wait_tasks(more, timeout=600)
    await wait_until(lambda: long.state is not TaskState.QUEUED)
    assert long.state is TaskState.RUNNING, long.exception
    await session.cancel(long)


async def test_times_add_up(session: Session) -> None:
    tasks = [ComputeTask(identity, args=(n,)) for n in range(50)]
    await run(session, *tasks)
    for task in tasks:
        assert task.timing.queue_s is not None and task.timing.queue_s >= 0
        assert task.timing.execution_s is not None and task.timing.execution_s >= 0
    summary = session.get_statistics()["summary"]
    assert summary["avg_total"] == pytest.approx(summary["avg_queue"] + summary["avg_execution"])


# --- refused whole


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ComputeTask(identity, backend="dragoon"), "unknown backend 'dragoon'"),
        (lambda: AITask("a prompt"), "no backend of this session runs a prompt"),
    ],
)
async def test_a_submission_with_one_wrong_task_is_refused_whole(
    session: Session, make: Callable[[], ComputeTask], words: str
) -> None:
    good, before = ComputeTask(identity, args=(1,)), len(session.tasks)
    with pytest.raises((InvalidTask, UnknownName), match=words):
        await session.submit_tasks([good, make()])
    assert (good.state, len(session.tasks)) == (TaskState.NEW, before)


# --- the engine's own life


@pytest.fixture(params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
def backend_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    monkeypatch.setenv(FAMILY, uuid.uuid4().hex)
    yield request.param


@pytest.mark.ci
async def test_native_functions_go_through_batch_with_the_same_guarantees(tmp_path: Path) -> None:
    async with Session([DragonExecutionBackendV3(num_workers=2, dispatch="batch")]) as session:
        good = [ComputeTask(identity, args=(n,)) for n in range(100)]
        bad = [ComputeTask(leave), ComputeTask(unpicklable), ComputeTask(raise_error)]
        slow = ComputeTask(
            sleep_with_children, args=(str(tmp_path / "up"),), task_backend_specific_kwargs={"timeout": 1.0}
        )
        process = ComputeTask(identity, args=(1,), task_backend_specific_kwargs=PROCESS)
        await run(session, *good[:50], *bad, slow, process, *good[50:])
    assert [task.return_value for task in good] == list(range(100))
    assert [task.cause for task in bad] == [Cause.CRASHED, Cause.ERROR, Cause.ERROR]
    assert (slow.cause, process.return_value) == (Cause.TIMEOUT, 1)
    assert not family("sleep", "300")


SLOW_PACKAGE = """
import pathlib, time
from .part import give
up = pathlib.Path(__file__).with_name("up")
if not up.exists():
    up.touch()
    time.sleep(300)
give = part.give
"""


async def test_a_cancel_that_cuts_an_import_off_does_not_spoil_it_for_the_next_task(
    backend_type: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package whose import was cut off after its parts were imported cannot be imported again in that process."""
    package = tmp_path / "slow_package"
    package.mkdir()
    (package / "__init__.py").write_text(SLOW_PACKAGE)
    (package / "part.py").write_text("def give(): return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    async with Session([backend_type(num_workers=1)]) as session:
        task, after = (ComputeTask(Module("slow_package:give")) for _ in range(2))
        await session.submit_tasks([task])
        await wait_until((package / "up").exists)
        await session.submit_tasks([after])
        await session.cancel(task)
        await session.wait_tasks([after], timeout=600)
        assert (task.state, after.state, after.return_value) == (TaskState.CANCELED, TaskState.DONE, 5), after.exception


async def test_closing_cancels_what_runs_and_leaves_nothing(backend_type: type[Any], tmp_path: Path) -> None:
    backend = await backend_type(num_workers=1)
    session = Session([backend])
    running = ComputeTask(sleep_with_children, args=(str(tmp_path / "up"),))
    job = ComputeTask(executable="sleep", arguments=["300"], task_backend_specific_kwargs=JOB)
    queued = ComputeTask(identity, args=(1,))
    needs = ComputeTask(identity, args=(running,))
    futures = await session.submit_tasks([running, job, queued, needs])
    await wait_until((tmp_path / "up").exists)
    await session.close()
    await asyncio.wait(futures)
    assert {task.state for task in session.tasks} == {TaskState.CANCELED}
    assert not family("sleep", "300")
    assert not family("rhapsody_mcp.engine")
    assert not session.folder.exists()
    await session.close()


@pytest.mark.parametrize("victims", ["host", "keeper", "launcher", "all"])
async def test_an_engine_that_dies_fails_its_tasks_as_lost_and_the_next_one_starts(
    backend_type: type[Any], victims: str, tmp_path: Path
) -> None:
    if victims == "launcher" and backend_type is LocalExecutionBackend:
        pytest.skip("only Dragon has a launcher")
    async with Session([backend_type(num_workers=1)]) as session:
        task = ComputeTask(sleep_with_children, args=(str(tmp_path / "up"),))
        await session.submit_tasks([task])
        await wait_until((tmp_path / "up").exists)
        keeper = set(family("rhapsody_mcp.engine.keeper"))
        launcher = set(family("bin/dragon -s")) - keeper
        host = set(family("rhapsody_mcp.engine.host")) - keeper - launcher
        chosen = {"host": host, "keeper": keeper, "launcher": launcher, "all": keeper | launcher | host}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that they die at one moment
            for pid in chosen[victims]:
                with suppress(ProcessLookupError):  # some end with one that was killed before them
                    os.kill(pid, number)
        await session.wait_tasks([task], timeout=600)
        assert (task.state, task.cause) == (TaskState.FAILED, Cause.LOST)
        await wait_until(lambda: not family("sleep", "300"))
        assert (await run_one(session, ComputeTask(identity, args=(9,)))).return_value == 9
    await wait_until(lambda: not family("rhapsody_mcp.engine"))
    assert not [path for pid in launcher for path in dragon_files(pid)]
