"""The ledger: what was written is there, in order, once, and in a file that only one process holds."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhapsody_mcp.engine.process.tree import started_at
from rhapsody_mcp.engine.task.start_log import log_start
from rhapsody_mcp.ledger.file_system import file_system, is_network
from rhapsody_mcp.ledger.inspection import inspect_ledger
from rhapsody_mcp.ledger.ledger import LOCK_FILE, Ledger
from rhapsody_mcp.ledger.lock import LockHolder, read_holder
from rhapsody_mcp.ledger.records import (
    Change,
    CloseSession,
    DropEngine,
    DropHandles,
    DropSession,
    EngineRow,
    FunctionRow,
    HandleRow,
    PutEngine,
    PutFunction,
    PutHandle,
    PutNumber,
    PutSession,
    PutSubmission,
    PutTasks,
    SubmissionRow,
    TaskEnded,
    TaskRequeued,
    TaskStarted,
    UseSession,
)
from rhapsody_mcp.ledger.schema import STEPS, migrate
from rhapsody_mcp.ledger.sql import execute_all
from rhapsody_mcp.ledger.store import LEDGER_FILE
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerInUse, LedgerTooNew, LedgerUnavailable
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value
from tests.ledgers import done, ended, session, task, tasks

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def opened(
    folder: Path, *, steps: tuple[tuple[str, ...], ...] = tuple(map(tuple, STEPS))
) -> AsyncIterator[Ledger]:
    ledger = Ledger(folder, steps)
    ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


# --- what is written is there


async def test_every_row_comes_back_from_a_new_process_of_the_ledger_as_it_was_put(tmp_path: Path) -> None:
    rows = task(1), task(2, parent="task.000001", recipe=b"")
    function = FunctionRow("s", 1, "f", "def f(): pass", "f", "()", "Does nothing.")
    submission = SubmissionRow("s", "key", b"{}", ("task.000001", "ü"), 4.0, "me")
    handle = HandleRow("h", b"[1]", 9.0)
    engine = EngineRow("mark", "dragon", "s", 7, 8, "/folder")
    changes = PutFunction(function), PutSubmission(submission), PutHandle(handle), PutEngine(engine)
    async with opened(tmp_path) as ledger:
        await ledger.commit(PutSession(session()), PutTasks(rows), *changes, PutNumber("opened", 3))
    async with opened(tmp_path) as ledger:
        assert await ledger.sessions() == [session()]
        assert await ledger.tasks("s") == list(rows)
        assert await ledger.functions("s") == [function]
        assert await ledger.submissions("s") == [submission]
        assert (await ledger.handles(), await ledger.engines()) == ([handle], [engine])
        assert (await ledger.number("opened"), await ledger.number("other")) == (3, 0)


async def test_an_outcome_comes_back_whole(tmp_path: Path) -> None:
    rank = RankOutcome(rank=0, host="n", pid=3, exit_code=-9, stderr=Stream("killed"), cause=Cause.CRASHED)
    outcome = Outcome(
        state=TaskState.FAILED,
        started=2.5,
        ended=3.25,
        value=Value("pickle", "Thing", 3, b"\x80\x00\xff", preview="<Thing>"),
        stdout=Stream("ü\0\n", "/nowhere/out", 10**10),
        cause=Cause.CRASHED,
        error="rank 0 was killed",
        ranks=(rank,),
        notes=("1 rank",),
    )
    async with opened(tmp_path) as ledger:
        ledger.write(PutTasks((task(),)), TaskEnded("s", "task.000000", 4, outcome))
        assert await ledger.flush(60)
        (row,) = await ledger.tasks("s")
    assert (row.outcome, row.state, row.position) == (outcome, TaskState.FAILED, 4)


async def test_the_state_of_a_task_follows_its_starts_and_its_end(tmp_path: Path) -> None:
    seen = []
    async with opened(tmp_path) as ledger:
        for change in (
            PutTasks((task(retries=1),)),
            TaskStarted("s", "task.000000", 2.0, 1),
            TaskRequeued("s", "task.000000", 1, "it crashed"),
            TaskStarted("s", "task.000000", 5.0, 2),
            ended(0),
        ):
            ledger.write(change)
            (row,) = await ledger.tasks("s")
            seen.append((row.state, row.started, row.attempts, row.last_failure))
    assert seen == [
        (TaskState.WAITING, None, 0, ""),
        (TaskState.RUNNING, 2.0, 1, ""),
        (TaskState.QUEUED, None, 1, "it crashed"),
        (TaskState.RUNNING, 5.0, 2, "it crashed"),
        (TaskState.DONE, 5.0, 2, "it crashed"),
    ]


async def test_of_two_ends_of_a_task_the_first_counts(tmp_path: Path) -> None:
    late = Outcome(state=TaskState.FAILED, ended=9.0, cause=Cause.LOST)
    async with opened(tmp_path) as ledger:
        ledger.write(tasks(1), ended(0))
        await ledger.flush(10)
        ledger.write(TaskEnded("s", "task.000000", 7, late), TaskStarted("s", "task.000000", 8.0, 2), tasks(1))
        (row,) = await ledger.tasks("s")
    assert (row.state, row.outcome, row.position) == (TaskState.DONE, done(), 0)


async def test_tasks_come_in_the_order_of_their_numbers_however_many_there_are(tmp_path: Path) -> None:
    rows = [msgspec.structs.replace(task(number), number=number // 2) for number in range(2500)]
    async with opened(tmp_path) as ledger:
        ledger.write(PutTasks(tuple(reversed(rows[:1000]))), PutTasks(tuple(rows[1000:])))
        found = await ledger.tasks("s")
    assert len({row.uid for row in found}) == 2500
    assert [row.number for row in found] == [row.number for row in rows]


async def test_a_dropped_session_leaves_nothing_and_takes_nothing_any_more(tmp_path: Path) -> None:
    function, submission = FunctionRow("s", 1, "f", "", "", "", ""), SubmissionRow("s", "k", b"", (), 1.0, "")
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session("other")), tasks(1, "other"), PutSession(session()), tasks(3))
        ledger.write(PutFunction(function), PutSubmission(submission), TaskStarted("s", "task.000000", 1.0, 1))
        ledger.write(ended(1), DropSession("s"), ended(2), TaskStarted("s", "task.000001", 1.0, 1))
        assert await ledger.sessions() == [session("other")]
        assert [await ledger.tasks("s"), await ledger.functions("s"), await ledger.submissions("s")] == [[], [], []]
        assert len(await ledger.tasks("other")) == 1
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        assert [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("starts", "ends")] == [
            0,
            0,
        ]


async def test_sessions_are_used_and_marked_as_closing(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()), UseSession("s", 5.0), UseSession("s", 3.0), CloseSession("s"))
        assert await ledger.sessions() == [msgspec.structs.replace(session(), used=5.0, closing=True)]


async def test_handles_expire_and_engines_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutHandle(HandleRow("old", b"1", 5.0)), PutHandle(HandleRow("new", b"2", 6.0)), DropHandles(6.0))
        ledger.write(*(PutEngine(EngineRow(mark, "vllm", "s", 1, 1, "")) for mark in "ab"), DropEngine("a"))
        assert [handle.task_id for handle in await ledger.handles()] == ["new"]
        assert [engine.mark for engine in await ledger.engines()] == ["b"]


async def test_reads_see_what_was_written_just_before_them(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        for number in range(50):
            ledger.write(PutNumber("n", number))
            assert await ledger.number("n") == number


async def test_what_is_committed_at_once_by_many_is_all_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await asyncio.gather(*(ledger.commit(PutNumber(f"n{number}", number)) for number in range(500)))
        assert [await ledger.number(f"n{number}") for number in (0, 499)] == [0, 499]


async def test_closing_writes_what_is_left_and_a_second_time_does_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    ledger.write(tasks(10_000), *(ended(number) for number in range(10_000)))
    await ledger.close()
    await ledger.close()
    async with opened(tmp_path) as ledger:
        assert {row.state for row in await ledger.tasks("s")} == {TaskState.DONE}
    with pytest.raises(LedgerUnavailable, match="is closed"):
        await ledger.commit(PutNumber("n", 1))
    with pytest.raises(LedgerUnavailable, match="is closed"):
        await ledger.number("n")


async def test_long_results_are_on_disk_before_the_row_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "value").write_bytes(b"x" * 100_000)
    synced = []

    def fsync(file: int, real: Callable[[int], None] = os.fsync) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{file}"), copied_count(tmp_path / "state", "ends")))
        real(file)

    async with opened(tmp_path / "state") as ledger:
        await ledger.commit(tasks(1))
        monkeypatch.setattr(os, "fsync", fsync)
        await ledger.commit(TaskEnded("s", "task.000000", 0, done(file=str(tmp_path / "value"))))
        assert copied_count(tmp_path / "state", "ends") == 1
    assert synced == [(str(tmp_path / "value"), 0), (str(tmp_path), 0)]


def copied_count(folder: Path, table: str) -> int:
    """The committed rows of a ledger that is in use."""
    with TemporaryDirectory() as place:
        for file in folder.iterdir():
            shutil.copy(file, place)
        with closing(sqlite3.connect(Path(place, LEDGER_FILE))) as connection:
            return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def test_a_result_whose_file_is_gone_is_recorded_nevertheless(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await ledger.commit(tasks(1), TaskEnded("s", "task.000000", 0, done(file=str(tmp_path / "gone" / "value"))))
        assert [row.state for row in await ledger.tasks("s")] == [TaskState.DONE]


CHANGES = st.one_of(
    st.builds(
        lambda number, attempts: TaskStarted("s", task(number).uid, 2.0, attempts), st.integers(0, 3), st.integers(1, 3)
    ),
    st.builds(
        lambda number, attempts: TaskRequeued("s", task(number).uid, attempts, "why"),
        st.integers(0, 3),
        st.integers(1, 3),
    ),
    st.builds(lambda number, data: ended(number, data), st.integers(0, 3), st.binary(max_size=2)),
    st.builds(lambda number, retries: PutTasks((task(number, retries=retries),)), st.integers(4, 9), st.integers(0, 2)),
    st.builds(UseSession, st.just("s"), st.floats(0, 9)),
    st.just(DropSession("s")),
)


@given(st.lists(CHANGES, max_size=12))
def test_changes_give_the_same_in_one_transaction_as_one_by_one(changes: list[Change]) -> None:
    assert dumped([[PutSession(session()), tasks(4), *changes]]) == dumped(
        [[change] for change in (PutSession(session()), tasks(4), *changes)]
    )


def dumped(transactions: list[list[Change]]) -> list[str]:
    """A database after these."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate(connection, STEPS)
        for changes in transactions:
            execute_all(connection, (row for change in changes for row in change.rows()))
        return list(connection.iterdump())


# --- what cannot be written


async def test_a_change_that_no_database_takes_is_refused_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutNumber("before", 1))
        ledger.write(PutNumber("\ud800", 1))
        ledger.write(PutNumber("after", 2))
        with pytest.raises(UnicodeEncodeError):
            await ledger.commit(PutNumber("with it", 1), PutNumber("\udfff", 1))
        assert [await ledger.number(name) for name in ("before", "after", "with it")] == [1, 2, 0]
        assert not ledger.problem
    assert ["cannot be written" in record.message for record in caplog.records] == [True]


async def test_a_record_that_cannot_be_read_spoils_no_other_and_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(tasks(2), ended(0), ended(1))
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection, connection:
        connection.execute("UPDATE ends SET outcome = x'81a5' WHERE uid = 'task.000000'")
    async with opened(tmp_path) as ledger:
        broken, whole = await ledger.tasks("s")
    assert whole.outcome == done()
    assert broken.outcome is not None and broken.outcome.cause is Cause.LOST and "ended DONE" in broken.outcome.error


async def test_a_commit_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        given_up = [asyncio.create_task(ledger.commit(PutNumber(f"n{number}", 1))) for number in range(20)]
        await asyncio.sleep(0)
        for one in given_up:
            one.cancel()
        ends = await asyncio.gather(*given_up, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await ledger.commit(PutNumber("last", 1))
        there = {await ledger.number(f"n{number}") for number in range(20)}
    async with opened(tmp_path) as ledger:
        assert {await ledger.number(f"n{number}") for number in range(20)} == there


# --- after a crash


async def test_tasks_that_ran_are_queued_again_where_they_may_be_and_else_lost_after_all_that_ended(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(
            PutSession(session()), PutTasks((task(0), task(1), task(2, retries=1), task(3), task(4, retries=1)))
        )
        ledger.write(*(TaskStarted("s", f"task.{number:06d}", 20.0, 1) for number in (0, 1, 2)))
        ledger.write(TaskStarted("s", "task.000004", 20.0, 2), ended(3))
        assert await ledger.reconcile(10.0) == 4
        rows = await ledger.tasks("s")
        assert await ledger.reconcile(11.0) == 0
    lost, queued = TaskState.FAILED, TaskState.QUEUED
    assert [row.state for row in rows] == [lost, lost, queued, TaskState.DONE, lost]
    assert [row.position for row in rows] == [4, 5, None, 3, 6]
    assert rows[2].attempts == 1 and "while this task was running" in rows[2].last_failure
    outcome = rows[0].outcome
    assert outcome is not None and outcome.cause is Cause.LOST and outcome.ended == 20.0


async def test_of_tasks_about_to_start_those_that_did_are_lost_and_the_others_queued_as_if_never_sent(
    tmp_path: Path,
) -> None:
    """Their folder tells, in which each is noted just before it starts."""
    log_start(str(tmp_path), "task.000001", 1, "engine/p1")
    async with opened(tmp_path / "state") as ledger:
        ledger.write(PutSession(session(folder=str(tmp_path))), tasks(2))
        ledger.write(*(TaskStarted("s", f"task.{number:06d}", 0.0, 1) for number in (0, 1)))
        assert await ledger.reconcile(3.0) == 2
        rows = await ledger.tasks("s")
    assert [(row.state, row.attempts) for row in rows] == [(TaskState.QUEUED, 0), (TaskState.FAILED, 1)]


async def test_a_task_with_children_is_left_to_them(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()), PutTasks((task(0), task(1, parent="task.000000"))))
        ledger.write(*(TaskStarted("s", f"task.{number:06d}", 2.0, 1) for number in (0, 1)))
        assert await ledger.reconcile(3.0) == 1
        assert [row.state for row in await ledger.tasks("s")] == [TaskState.RUNNING, TaskState.FAILED]


async def test_old_sessions_without_unfinished_tasks_are_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        for id, used in (("old", 1.0), ("busy", 1.0), ("new", 9.0)):
            ledger.write(PutSession(session(id, used)), tasks(1, id))
        ledger.write(ended(0, session="old"), ended(0, session="new"))
        assert await ledger.prune(5.0) == [session("old", 1.0)]
        assert [row.id for row in await ledger.sessions()] == ["busy", "new"]
        assert await ledger.tasks("old") == []


# --- who holds it


async def test_a_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(
            LedgerInUse, match=rf"held by process {os.getpid()} on {socket.gethostname()} since 20"
        ) as told:
            Ledger(tmp_path).open()
    assert (told.value.pid, told.value.host) == (os.getpid(), socket.gethostname())
    assert time.time() - 3600 < told.value.since <= time.time()


async def test_it_can_be_held_again_once_it_is_given_back(tmp_path: Path) -> None:
    for _ in range(3):
        async with opened(tmp_path):
            assert read_holder(tmp_path / LOCK_FILE) is not None
        assert read_holder(tmp_path / LOCK_FILE) is None


def held_elsewhere(folder: Path) -> Path:
    """A lock file as another host leaves it whose file system keeps locks on each host by itself."""
    file = folder / LOCK_FILE
    file.write_bytes(msgspec.json.encode(LockHolder("login1", 1, 1, 1.0)))
    return file


async def test_a_holder_on_another_host_counts_while_its_heartbeat_goes_on(tmp_path: Path) -> None:
    file = held_elsewhere(tmp_path)
    async with asyncio.TaskGroup() as group:

        async def beat() -> None:
            while True:
                os.utime(file)
                await asyncio.sleep(0.05)

        beating = group.create_task(beat())
        with pytest.raises(LedgerInUse, match="held by process 1 on login1 since"):
            await asyncio.to_thread(Ledger(tmp_path).open)
        beating.cancel()


async def test_a_holder_that_was_killed_on_another_host_is_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rhapsody_mcp.ledger.lock._OTHER_HOST_S", 0.5)
    file = held_elsewhere(tmp_path)
    async with opened(tmp_path) as ledger:
        holder = read_holder(file)
        assert holder is not None and holder.host == socket.gethostname()
        assert ledger.beat()
        held_elsewhere(tmp_path)
        assert not ledger.beat()


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate(b"\n")


@pytest.mark.parametrize("left", ["a dead process", "another process of its pid", "half a word"])
async def test_a_lock_that_was_left_is_taken_over(tmp_path: Path, left: str) -> None:
    with sleeper() as other:
        started = started_at(other.pid)
        if left == "a dead process":
            other.kill()
            other.wait()
        facts = LockHolder(socket.gethostname(), other.pid, started - (left == "another process of its pid"), 1.0)
        text = b'{"host": "' if left == "half a word" else msgspec.json.encode(facts)
        (tmp_path / LOCK_FILE).write_bytes(text)
        async with opened(tmp_path):
            now = read_holder(tmp_path / LOCK_FILE)
    assert now is not None and now.pid == os.getpid() and now.started == started_at(os.getpid())


async def test_a_living_process_holds_it_even_where_the_file_system_knows_no_locks(tmp_path: Path) -> None:
    with sleeper() as other:
        facts = LockHolder(socket.gethostname(), other.pid, started_at(other.pid), 5.0)
        (tmp_path / LOCK_FILE).write_bytes(msgspec.json.encode(facts))
        with pytest.raises(LedgerInUse, match=f"process {other.pid}"):
            Ledger(tmp_path).open()
    assert read_holder(tmp_path / LOCK_FILE) == facts


# --- versions


async def test_an_older_version_is_taken_to_the_newest(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()), tasks(2), ended(0))
    before = tuple(map(tuple, STEPS))
    later = (
        *before,
        ("CREATE TABLE later (what TEXT)", "INSERT INTO later SELECT uid FROM tasks", "DROP TABLE engines"),
    )
    async with opened(tmp_path, steps=later) as ledger:
        assert [row.state for row in await ledger.tasks("s")] == [TaskState.DONE, TaskState.WAITING]
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        assert connection.execute("SELECT count(*) FROM later").fetchone() == (2,)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(later),)


async def test_a_step_that_fails_leaves_the_older_version_as_it_was(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()), tasks(2))
    wrong = (*map(tuple, STEPS), ("DROP TABLE tasks", "CREATE TABLE sessions (id TEXT)"))
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        Ledger(tmp_path, wrong).open()
    async with opened(tmp_path) as ledger:
        assert len(await ledger.tasks("s")) == 2


async def test_a_ledger_of_a_later_version_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()))
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / LEDGER_FILE).read_bytes()
    with pytest.raises(LedgerTooNew, match=r"version 99, and this one knows 1\. Nothing was changed"):
        Ledger(tmp_path).open()
    assert (tmp_path / LEDGER_FILE).read_bytes() == before


# --- damage


def damage(folder: Path, how: str) -> None:
    path = folder / LEDGER_FILE
    data = path.read_bytes()
    if how == "a page":
        data = data[: 4 * 4096] + bytes(range(256)) * 16 + data[5 * 4096 :]
    elif how == "its start":
        data = b"not a database, " + data[16:]
    elif how == "its end":
        data = data[: len(data) // 2]
    path.write_bytes(b"[settings]\n" * 300 if how == "everything" else data)


@pytest.mark.parametrize("how", ["a page", "its start", "its end", "everything"])
async def test_a_damaged_ledger_is_refused_and_stays_as_it_is(tmp_path: Path, how: str) -> None:
    async with opened(tmp_path) as ledger:
        ledger.write(PutSession(session()), tasks(1000), *(ended(number) for number in range(1000)))
    damage(tmp_path, how)
    before = (tmp_path / LEDGER_FILE).read_bytes()
    for _ in range(2):
        with pytest.raises(LedgerDamaged, match=r"damaged: .* Nothing is written into it\. .*move it away: mkdir "):
            Ledger(tmp_path).open()
    assert (tmp_path / LEDGER_FILE).read_bytes() == before


async def test_a_database_of_something_else_is_no_ledger(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(LedgerDamaged, match="tables of something else"):
        Ledger(tmp_path).open()


# --- where it is


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse", "fuse.sshfs", "9p"]
)
def test_network_file_systems_are_known(kind: str) -> None:
    assert is_network(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "zfs", "overlay", "apfs", ""])
def test_local_file_systems_are_known(kind: str) -> None:
    assert not is_network(kind)


def test_the_file_system_of_a_folder_is_that_of_its_mount(tmp_path: Path) -> None:
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert file_system(tmp_path) in (told, *told.split("/"), "ext4")
    assert file_system(Path("/dev/shm")) == "tmpfs"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def test_a_look_from_outside_counts_what_is_there_and_leaves_it_alone(tmp_path: Path) -> None:
    assert inspect_ledger(tmp_path / "none").bytes == 0
    async with opened(tmp_path) as ledger:
        await ledger.commit(
            PutSession(session("a")), PutSession(session("b")), PutSession(session("c")), CloseSession("c")
        )
        before = contents(tmp_path)
        seen = inspect_ledger(tmp_path)
        assert contents(tmp_path) == before
        assert (seen.sessions, seen.journal, seen.problem) == (2, "WAL", "")
        assert seen.holder is not None and seen.holder.pid == os.getpid()
        await ledger.commit(PutSession(session("d")))
    assert inspect_ledger(tmp_path).holder is None and inspect_ledger(tmp_path).sessions == 3
    (tmp_path / LEDGER_FILE).write_bytes(b"no database" * 100)
    assert inspect_ledger(tmp_path).sessions is None and "not a database" in inspect_ledger(tmp_path).problem


def test_errors_of_the_ledger_survive_pickling() -> None:
    import pickle

    error = LedgerInUse("/x", "host", 7, 1.5)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.pid, again.host, again.since) == (str(error), 7, "host", 1.5)
