"""The ledger when its disk is full, read-only, damaged or gone, when the clock jumps, and when its process is killed.

The faults are made for real: as root, with file systems that the tests mount. Where one cannot be made the test fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import IO

import pytest

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import PutNumber, PutSession, PutTasks, TaskEnded
from rhapsody_mcp.ledger.store import LEDGER_FILE, Journal
from rhapsody_mcp.ledger.writer import MAX_QUEUED
from rhapsody_mcp.model.errors import LedgerDamaged, LedgerError, LedgerUnavailable
from rhapsody_mcp.model.states import TaskState
from tests.ledgers import MKFS, done, ended, file_system, session, task, tasks
from tests.processes import wait_until

pytestmark = pytest.mark.anyio
JOURNALS: tuple[Journal, ...] = ("WAL", "TRUNCATE")
both_journals = pytest.mark.parametrize("journal", JOURNALS)


@asynccontextmanager
async def opened(folder: Path, journal: Journal | None = None) -> AsyncIterator[Ledger]:
    ledger = Ledger(folder, journal=journal)
    ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


# --- the disk is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    with file_system(tmp_path / "small", "-o", "size=2m") as place:
        yield place


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A disk that has room for a ledger and its log."""
    with file_system(tmp_path / "roomy", "-o", "size=12m") as place:
        yield place


def fill(place: Path) -> Path:
    """To the last byte, with the file that it gives."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\0" * 4096)
    return ballast


@both_journals
async def test_on_a_full_disk_commits_are_refused_and_the_rest_is_written_once_there_is_room(
    small: Path, journal: Journal
) -> None:
    async with opened(small / "state", journal) as ledger:
        await ledger.commit(PutSession(session()), tasks(100))
        ballast = fill(small)
        ledger.write(*(ended(number, b"x" * 2000) for number in range(100)))
        await wait_until(lambda: bool(ledger.problem))
        with pytest.raises(LedgerUnavailable, match="the disk is full"):
            await ledger.commit(PutNumber("withdrawn", 1), timeout_s=1.2)
        assert "the disk is full" in ledger.problem
        assert len(await ledger.tasks("s")) == 100  # what is there can be read
        assert not await ledger.flush(0.1)
        ballast.unlink()
        assert await ledger.flush(30)
        assert not ledger.problem
        assert {row.state for row in await ledger.tasks("s")} == {TaskState.DONE}
        assert await ledger.number("withdrawn") == 0


@both_journals
async def test_a_ledger_on_a_full_disk_can_be_opened_and_read(small: Path, journal: Journal) -> None:
    async with opened(small / "state", journal) as ledger:
        await ledger.commit(PutSession(session()), tasks(3), ended(1))
    fill(small)
    async with opened(small / "state", journal) as ledger:
        assert [row.outcome for row in await ledger.tasks("s")] == [None, done(), None]


@both_journals
async def test_while_a_disk_fills_and_empties_what_was_refused_is_not_there_and_what_was_taken_is(
    roomy: Path, journal: Journal
) -> None:
    chance = random.Random(7)
    taken: set[int] = set()
    refused: set[int] = set()

    def is_short(number: int) -> bool:
        return number < 1000 or min(len(taken), len(refused)) <= 100

    async def submit(lane: int) -> None:
        for number in takewhile(is_short, count(lane, 20)):
            try:
                new = PutTasks((task(number, recipe=b"x" * 200),)), ended(number)
                await ledger.commit(*new, timeout_s=chance.choice((0.0, 0.002, 0.05, 0.3)))
                taken.add(number)
            except LedgerUnavailable:
                refused.add(number)
            await asyncio.sleep(chance.random() / 50)  # any time will do

    async def fill_and_empty() -> None:
        while True:
            ballast = fill(roomy)
            await asyncio.sleep(chance.random() / 5)
            ballast.unlink()
            await asyncio.sleep(chance.random() / 2)

    async with opened(roomy / "state", journal) as ledger:
        filling = asyncio.create_task(fill_and_empty())
        await asyncio.gather(*(submit(lane) for lane in range(20)))
        filling.cancel()
        (roomy / "ballast").unlink(missing_ok=True)
        assert await ledger.flush(30)
    async with opened(roomy / "state", journal) as ledger:
        assert {row.number for row in await ledger.tasks("s")} == taken
        assert len(taken) > 100 and len(refused) > 100


async def test_a_log_that_takes_all_the_room_is_brought_into_the_ledger(small: Path) -> None:
    """What is written again and again needs no more room in the end."""
    async with opened(small / "state") as ledger:
        for _ in range(200):
            await ledger.commit(PutTasks((task(recipe=b"x" * 30_000),)))
    assert (small / "state" / LEDGER_FILE).stat().st_size < 200_000


async def test_where_there_is_no_room_for_a_ledger_it_is_not_opened(small: Path) -> None:
    ballast = fill(small)
    with pytest.raises(LedgerUnavailable, match=r"disk is full|No space left"):
        Ledger(small / "state").open()
    ballast.unlink()
    async with opened(small / "state"):
        pass


async def test_closing_on_a_full_disk_tells_what_is_lost_and_gives_it_back(small: Path) -> None:
    ledger = Ledger(small / "state")
    ledger.open()
    await ledger.commit(tasks(1))
    ballast = fill(small)
    ledger.write(PutTasks((task(1, recipe=b"x" * 100_000),)), PutNumber("n", 1))
    with pytest.raises(LedgerUnavailable, match=r"2 changes could not be written before the end: .*the disk is full"):
        await ledger.close()
    ballast.unlink()
    async with opened(small / "state") as ledger:
        assert len(await ledger.tasks("s")) == 1


async def test_too_long_a_backlog_refuses_commits_at_once(small: Path) -> None:
    async with opened(small / "state") as ledger:
        await ledger.commit(tasks(1))
        ballast = fill(small)
        ledger.write(PutTasks((task(1, recipe=b"x" * 100_000),)))
        await wait_until(lambda: bool(ledger.problem))
        for number in range(MAX_QUEUED):
            ledger.write(PutNumber("n", number))
        async with asyncio.timeout(60):
            with pytest.raises(LedgerUnavailable, match="the disk is full"):
                await ledger.commit(PutNumber("refused", 1), timeout_s=3600)
        ballast.unlink()
        assert await ledger.flush(60)
        assert (await ledger.number("n"), await ledger.number("refused")) == (MAX_QUEUED - 1, 0)


async def test_a_result_whose_file_cannot_be_seen_to_the_disk_is_not_recorded_until_it_is_there(
    tmp_path: Path, roomy: Path
) -> None:
    """A disk in a file on a full disk: it takes the result into memory, and says at fsync that there is no room."""
    image = roomy / "image"
    image.touch()
    os.truncate(image, 64 << 20)
    subprocess.run([MKFS, "-q", "-O", "^has_journal", image], check=True)  # noqa: ASYNC221
    thin, result = tmp_path / "thin", os.urandom(1 << 20)
    async with opened(tmp_path / "state") as ledger:
        await ledger.commit(tasks(1))
        with file_system(thin, "-o", "loop", kind="ext4", what=str(image)):
            ballast = fill(roomy)
            (thin / "value").write_bytes(result)
            ledger.write(TaskEnded("s", "task.000000", 0, done(file=str(thin / "value"))))
            await wait_until(lambda: bool(ledger.problem))
            assert re.search(f"{thin / 'value'}: (Input/output error|No space left)", ledger.problem)
            await ledger.commit(PutNumber("meanwhile", 1))
            assert [row.state for row in await ledger.tasks("s")] == [TaskState.WAITING]
            ballast.unlink()
            assert await ledger.flush(30) and not ledger.problem
            assert [row.state for row in await ledger.tasks("s")] == [TaskState.DONE]
        with file_system(thin, "-o", "loop", kind="ext4", what=str(image)):  # what is there after a power cut
            assert (thin / "value").read_bytes() == result and sorted(os.listdir(thin)) == ["lost+found", "value"]


# --- it is read-only, or gone


async def test_a_ledger_on_a_read_only_disk_is_not_opened(tmp_path: Path) -> None:
    with file_system(tmp_path / "disk") as place:
        async with opened(place / "state") as ledger:
            await ledger.commit(PutSession(session()))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)  # noqa: ASYNC221
        with pytest.raises(LedgerUnavailable, match="Read-only file system"):
            Ledger(place / "state").open()
        with pytest.raises(LedgerUnavailable, match="Read-only file system"):
            Ledger(place / "none yet").open()


@both_journals
async def test_what_is_written_into_a_deleted_file_is_not_taken_for_written(tmp_path: Path, journal: Journal) -> None:
    async with opened(tmp_path, journal) as ledger:
        await ledger.commit(PutNumber("n", 1))
        (tmp_path / LEDGER_FILE).rename(tmp_path / "away")
        ledger.write(PutNumber("m", 1))  # it is tried again and again
        await wait_until(lambda: "its file is gone" in ledger.problem)
        with pytest.raises(LedgerUnavailable, match="its file is gone"):
            await ledger.commit(PutNumber("n", 2), timeout_s=0.2)
        (tmp_path / LEDGER_FILE).touch()
        await wait_until(lambda: "another file has taken its place" in ledger.problem)
        with pytest.raises(LedgerUnavailable, match="another file has taken its place"):
            await ledger.commit(PutNumber("n", 3), timeout_s=0.2)
        (tmp_path / "away").replace(tmp_path / LEDGER_FILE)
        await ledger.commit(PutNumber("n", 4))
        assert (await ledger.number("n"), await ledger.number("m")) == (4, 1)


WITHOUT_LOCKS = """
import asyncio, ctypes, pathlib, platform, struct, sys
from rhapsody_mcp.ledger.records import PutNumber
from rhapsody_mcp.ledger.ledger import Ledger

flock, fcntl = {"x86_64": (73, 72), "aarch64": (32, 25)}[platform.machine()]
load, equal, at_least, more, end = 0x20, 0x15, 0x35, 0x25, 0x06
lines = (
    (load, 0, 0, 0), (equal, 4, 0, flock), (equal, 0, 4, fcntl),
    (load, 0, 0, 24), (at_least, 0, 2, 5), (more, 1, 0, 7),  # F_GETLK, F_SETLK and F_SETLKW
    (end, 0, 0, 0x00050000 | 38), (end, 0, 0, 0x7FFF0000),  # ENOSYS, or go on
)
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(filter)))
assert not ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) and not ctypes.CDLL(None).prctl(22, 2, program, 0, 0)

async def main():
    ledger = Ledger(pathlib.Path(sys.argv[1]), journal="TRUNCATE")
    ledger.open()
    await ledger.commit(PutNumber("opened", await ledger.number("opened") + 1))
    print(await ledger.number("opened"), ledger._lock.is_supported, flush=True)
    input()

asyncio.run(main())
"""


def without_locks(folder: Path) -> subprocess.Popen[str]:
    """A process in which the kernel knows no file locks, as on Lustre without the option `flock`."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(folder)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)


def test_where_the_file_system_knows_no_locks_a_living_process_holds_it_and_a_dead_one_does_not(tmp_path: Path) -> None:
    with without_locks(tmp_path) as first:
        assert first.stdout is not None and first.stdout.readline() == "1 False\n", first.communicate()[1]
        with without_locks(tmp_path) as second:
            assert f"held by process {first.pid}" in second.communicate()[1]
        first.kill()
        first.wait()
        with without_locks(tmp_path) as third:
            assert third.communicate("\n")[0] == "2 False\n"


READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN")
connection.execute("SELECT * FROM sessions").fetchall()
print("reads", flush=True)
input()
"""


async def test_a_ledger_that_another_program_reads_is_left_to_it(tmp_path: Path) -> None:
    async with opened(tmp_path):
        pass
    command = (sys.executable, "-c", READER, str(tmp_path / LEDGER_FILE))
    reader = await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1)
    assert reader.stdout is not None and await reader.stdout.readline() == b"reads\n"
    with pytest.raises(LedgerUnavailable, match="another program has it open"):
        Ledger(tmp_path).open()
    await reader.communicate(b"\n")
    async with opened(tmp_path):
        pass


# --- it is damaged while it is open


def overwrite(path: Path) -> None:
    """Every page but the first, by another process: one that closes a file gives back its own process's locks."""
    code = (
        "import os, sys; file = os.open(sys.argv[1], os.O_WRONLY); os.pwrite(file, os.urandom(int(sys.argv[2])), 4096)"
    )
    subprocess.run([sys.executable, "-c", code, path, str(path.stat().st_size - 4096)], check=True)


@both_journals
@pytest.mark.parametrize("found", ["by a read", "by a commit"])
async def test_damage_that_is_found_later_stops_all_writing_and_is_told(
    tmp_path: Path, found: str, journal: Journal
) -> None:
    async with opened(tmp_path, journal) as ledger:
        await ledger.commit(
            PutSession(session()), PutTasks(tuple(task(number, recipe=b"x" * 5000) for number in range(1000)))
        )
    async with opened(tmp_path, journal) as ledger:
        overwrite(tmp_path / LEDGER_FILE)
        with pytest.raises(LedgerDamaged):
            await (ledger.tasks("s") if found == "by a read" else ledger.commit(tasks(1000)))
        assert "damaged" in ledger.problem
        ledger.write(ended(1))
        with pytest.raises(LedgerDamaged, match="mv "):
            await ledger.commit(PutNumber("n", 1))
        assert not await ledger.flush(1)
    with pytest.raises(LedgerDamaged):
        Ledger(tmp_path).open()


# --- clocks


async def test_a_clock_that_jumps_forward_makes_no_session_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    month = 30 * 86400.0
    now = time.time
    async with opened(tmp_path) as ledger:
        await ledger.commit(PutSession(session("used today", now())), PutSession(session("old", now() - 2 * month)))
        monkeypatch.setattr(time, "time", lambda: now() + 12 * month)
        assert [row.id for row in await ledger.prune(time.time() - month)] == ["old"]
        monkeypatch.setattr(time, "time", lambda: now() - 12 * month)
        assert await ledger.prune(time.time() - month) == []
        assert [row.id for row in await ledger.sessions()] == ["used today"]


# --- its process is killed

WRITER = """
import asyncio, pathlib, sys
from rhapsody_mcp.ledger.records import PutNumber, PutTasks
from rhapsody_mcp.ledger.ledger import Ledger
from tests.ledgers import ended, task

async def main():
    ledger = Ledger(pathlib.Path(sys.argv[1]), journal=sys.argv[2])
    ledger.open()
    first = await ledger.number("rounds")

    async def one(lane):
        number = first + lane
        while True:
            ledger.write(PutNumber("unawaited", number))
            new = PutTasks((task(number, recipe=b"x" * 3000),))
            await ledger.commit(new, ended(number), PutNumber("rounds", number + 8))
            print(number, flush=True)
            number += 8

    await asyncio.gather(*(one(lane) for lane in range(8)))

asyncio.run(main())
"""
ROUNDS = int(os.environ.get("RHAPSODY_LEDGER_KILLS", "6"))


@both_journals
async def test_whatever_was_committed_is_there_after_a_kill_and_nothing_by_halves(
    tmp_path: Path, journal: Journal
) -> None:
    chance = random.Random(4)
    told: set[int] = set()
    for _ in range(ROUNDS):
        told |= await written_until_killed(tmp_path, journal, lines=chance.randrange(1, 400))
        async with opened(tmp_path, journal) as ledger:
            rows = await ledger.tasks("s")
        assert told <= {row.number for row in rows}
        assert {row.state for row in rows} == {TaskState.DONE}


async def written_until_killed(folder: Path, journal: Journal, lines: int) -> set[int]:
    """What it said was committed."""
    command = (sys.executable, "-c", WRITER, str(folder), journal)
    writer = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert writer.stdout is not None
    told = [await writer.stdout.readline() for _ in range(lines)]
    writer.kill()
    told += (await writer.stdout.read()).splitlines(keepends=True)
    await writer.wait()
    return {int(line) for line in told if line.endswith(b"\n")}


RACER = """
import asyncio, pathlib, sys
from rhapsody_mcp.model.errors import LedgerInUse
from rhapsody_mcp.ledger.ledger import Ledger

for folder in sys.stdin:
    ledger = Ledger(pathlib.Path(folder.strip()))
    try:
        ledger.open()
        print("has it", flush=True)
    except LedgerInUse as error:
        print(error.pid, flush=True)
    sys.stdin.readline()
    asyncio.run(ledger.close())
    print("closed", flush=True)
"""


def test_of_two_processes_that_open_it_at_once_one_gets_it_and_the_other_is_told_which(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for number in range(40):
            place = tmp_path / str(number % 4)  # a new one, and one that was closed
            answers = asked(racers, str(place))
            assert sorted(answers)[-1] == "has it" and len(set(answers)) == 2
            loser = answers.index("has it") ^ 1
            assert answers[loser] in (str(racers[loser ^ 1].pid), "0")
            assert asked(racers, "close") == ["closed", "closed"]
    finally:
        for racer in racers:
            racer.communicate()


def asked(processes: list[subprocess.Popen[str]], line: str) -> list[str]:
    for process in processes:
        write(process.stdin, line)
    return [process.stdout.readline().strip() for process in processes if process.stdout is not None]


def write(file: IO[str] | None, line: str) -> None:
    assert file is not None
    file.write(f"{line}\n")
    file.flush()


LATER = """
import os, sqlite3, sys
sqlite3.connect(sys.argv[1]).execute("PRAGMA user_version = 9")
os._exit(0)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (LEDGER_FILE, f"{LEDGER_FILE}-wal")}


async def test_a_ledger_of_a_later_version_stays_as_a_crash_left_it(tmp_path: Path) -> None:
    """With changes that are in its write-ahead log alone."""
    await written_until_killed(tmp_path, "WAL", lines=20)
    subprocess.run([sys.executable, "-c", LATER, tmp_path / LEDGER_FILE], check=True)  # noqa: ASYNC221
    before = contents(tmp_path)
    with pytest.raises(LedgerError, match="version 9"):
        Ledger(tmp_path).open()
    assert contents(tmp_path) == before and before[f"{LEDGER_FILE}-wal"]


async def test_what_a_kill_left_beside_it_is_gone_once_it_was_opened_and_closed(tmp_path: Path) -> None:
    await written_until_killed(tmp_path, "WAL", lines=20)
    async with opened(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [LEDGER_FILE, "lock"]
