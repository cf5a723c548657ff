"""What is left of an engine when its processes die, in every order: nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from glob import glob
from itertools import permutations
from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.engine.process.run_dirs import sweep
from rhapsody_mcp.engine.process.shared_memory import segments_of
from rhapsody_mcp.engine.process.tree import descendants, relatives, started_at
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import EngineRow, PutEngine
from rhapsody_mcp.runtime.recovery.orphans import end_orphans
from tests.engine import vllm_stand_in
from tests.processes import FAMILY, dragon_files, wait_until

pytestmark = pytest.mark.anyio

LOCAL = ("owner", "keeper", "host", "fork server", "supervisor", "worker", "rank")
DRAGON = ("owner", "keeper", "launcher", "host")
VLLM = ("owner", "keeper", "server", "engine core")
KILL, TERM = signal.SIGKILL, signal.SIGTERM

Deaths = tuple[tuple[str, signal.Signals], ...]


def deaths() -> Iterator[tuple[str, Deaths]]:
    """Which engine, and which of its processes get which signals, in order; all of a moment."""
    """`stand-in` is one for vLLM, under the real keeper and launcher."""
    every = {"local": LOCAL, "dragon": (*DRAGON, "fork server", "supervisor", "worker", "rank"), "stand-in": VLLM}
    for kind, roles in every.items():
        yield from ((kind, ((role, number),)) for role in roles for number in (KILL, TERM))
        yield kind, tuple((role, KILL) for role in roles)
    yield from (("local", ((one, KILL), (other, KILL))) for one, other in permutations(LOCAL, 2))
    yield from (("dragon", ((one, KILL), (other, KILL))) for one, other in permutations(DRAGON, 2))
    yield from (("stand-in", ((one, KILL), (other, KILL))) for one, other in permutations(VLLM, 2))
    yield from (("dragon", (("keeper", TERM), (role, KILL))) for role in ("owner", "launcher", "host"))


def name(row: object) -> str:
    if isinstance(row, tuple):
        return "-".join(f"{role}.{number.name.removeprefix('SIG').lower()}" for role, number in row)
    return str(row)


class Engine:
    """An owner in a process of its own, with its engine, and everything that they are made of."""

    def __init__(self, owner: asyncio.subprocess.Process, family: str, temporary: Path, ledger: Path) -> None:
        self.owner, self.family, self.temporary, self.ledger = owner, family, temporary, ledger
        self.processes: dict[int, int] = {}
        self.commands: dict[int, str] = {}

    def look(self) -> None:
        for pid in [self.owner.pid, *descendants(self.owner.pid)]:
            self.processes[pid], self.commands[pid] = started_at(pid), command_of(pid)

    def living(self, role: str) -> list[int]:
        return [pid for pid in self._of(role) if started_at(pid) == self.processes[pid]]

    def _of(self, role: str) -> list[int]:
        named = {
            "keeper": self._with("engine.keeper"),
            "launcher": self._with("bin/dragon -s", but=("engine.keeper",)),
            "host": self._with("engine.host", but=("engine.keeper", "bin/dragon -s")),
            "server": self._with("vllm_launcher.py", but=("engine.keeper",)),
            "engine core": self._with("VLLM::EngineCore"),
        }
        forked = self._with("engine.fork_server")
        placed = [*self._with("engine.supervisor"), *(pid for pid in forked if parent_of(pid) in forked)]
        return {
            "owner": [self.owner.pid],
            **named,
            "fork server": [pid for pid in forked if parent_of(pid) not in forked],
            "supervisor": placed,
            "worker": self._with("engine.worker"),
            "rank": [pid for pid in self._with("sleep 300") if parent_of(pid) in placed],
        }[role]

    def _with(self, word: str, but: tuple[str, ...] = ()) -> list[int]:
        return [
            pid
            for pid, command in self.commands.items()
            if word in command and not any(other in command for other in but)
        ]

    def left(self) -> list[str]:
        """The processes and files that are still there."""
        alive = relatives((pid for pid, started in self.processes.items() if started_at(pid) == started), set())
        mark = f"{FAMILY}={self.family}".encode()
        files = {path for pid in self._of("launcher") for path in dragon_files(pid)}
        folders = [str(path) for path in self.temporary.iterdir() if path.name.startswith("rhapsody-keeper")]
        folders += map(str, self.temporary.glob("rhapsody-*/*"))
        return [
            *(f"{pid} {command_of(pid)}" for pid in alive | set(carrying(mark))),
            *sorted(files),
            *folders,
        ]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def children_of(pid: int) -> Iterator[int]:
    """Also those that have ended and are not collected."""
    yield from (int(folder.name) for folder in Path("/proc").glob("[0-9]*") if parent_of(int(folder.name)) == pid)


def carrying(mark: bytes) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes() and (folder / "cmdline").read_bytes():
                yield int(folder.name)


@asynccontextmanager
async def engine(kind: str, stray: str = "", variables: Mapping[str, str] = os.environ) -> AsyncIterator[Engine]:
    """An engine that runs a function and a program; whatever is left of it at the end is killed."""
    family, temporary = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="reap-", dir="/tmp"))
    (temporary / "ledger").mkdir()
    stand_in = {"PYTHONPATH": str(vllm_stand_in.install(temporary / "stand-in"))} if kind == "stand-in" else {}
    owner = await asyncio.create_subprocess_exec(
        *[
            sys.executable,
            "-m",
            "tests.engine.owner",
            kind.replace("stand-in", "vllm"),
            str(temporary / "ledger"),
            str(temporary),
            stray,
        ],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**variables, FAMILY: family, "TMPDIR": str(temporary), **stand_in},
    )
    found = Engine(owner, family, temporary, temporary / "ledger")
    try:
        assert owner.stdout is not None
        async with asyncio.timeout(600):
            assert await owner.stdout.readline() == b"ready\n"
        found.look()
        yield found
    finally:
        for pid in {*carrying(f"{FAMILY}={family}".encode())} | {
            pid for pid, started in found.processes.items() if started_at(pid) == started
        }:
            with suppress(ProcessLookupError):
                os.kill(pid, KILL)
        await owner.wait()
        shutil.rmtree(temporary, ignore_errors=True)


async def gone(found: Engine) -> None:
    try:
        await wait_until(lambda: not found.left(), 600)
    except TimeoutError:
        pytest.fail("\n".join(["it is still there:", *found.left()]))


async def swept(found: Engine) -> None:
    """What the next engine does before it starts: a keeper whose command ended a moment before its owner did leaves
    the folder to that."""
    await wait_until(lambda: not found.living("keeper"), 600)
    for folder in found.temporary.glob("rhapsody-*/*"):
        sweep(folder)


async def reaped(found: Engine) -> list[str]:
    """What the next service says at its start; the ledger names no engine afterwards."""
    ledger = Ledger(found.ledger)
    ledger.open()
    try:
        told = await end_orphans(ledger)
        assert await ledger.engines() == []
    finally:
        await ledger.close()
    return told


@pytest.mark.parametrize(("kind", "row"), list(deaths()), ids=name)
async def test_whatever_dies_in_whatever_order_nothing_of_the_engine_is_left(kind: str, row: Deaths) -> None:
    async with engine(kind) as found:
        victims = [(found.living(role), number) for role, number in row]
        assert all(pids for pids, _ in victims), "each of them lives before"
        for pids, number in victims:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        died = {role for role, _ in row}
        if "owner" not in died:
            assert found.owner.stdin is not None
            found.owner.stdin.close()
        await found.owner.wait()
        if {"owner", "keeper"} <= died:
            await reaped(found)
        elif "owner" in died and len(died) > 1:
            await swept(found)
        await gone(found)
        assert await reaped(found) == []


@pytest.mark.parametrize("died", [("owner", "keeper", "launcher"), ("owner", "keeper"), ("owner", "keeper", "host")])
async def test_the_same_where_dragon_has_few_variables_over_which_to_write_its_title(died: tuple[str, ...]) -> None:
    """What is marked by a variable of its environment is found by something else then."""
    few = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], "USER": "somebody"}
    async with engine("dragon", variables=few) as found:
        for role in died:
            os.kill(found.living(role)[0], KILL)
        await found.owner.wait()
        await reaped(found)
        await gone(found)


@pytest.mark.ci
@pytest.mark.vllm
async def test_all_of_a_real_vllm_server_killed_at_one_moment_leaves_nothing_after_the_next_start() -> None:
    async with engine("vllm") as found:
        segments = segments_of(found.processes)
        assert segments
        for number in (signal.SIGSTOP, KILL):  # stopped first, so that they die at one moment
            for role in VLLM:
                os.kill(found.living(role)[0], number)
        await found.owner.wait()
        assert "the vllm engine of session s1" in (await reaped(found))[0]
        await gone(found)
        assert not segments & set(glob("/dev/shm/*"))


# --- folders


MAKE_FOLDERS = """
from rhapsody_mcp.engine.process.run_dirs import RunDir
for _ in range(100):
    folders = [RunDir() for _ in range(3)]
    assert all((folder.path / "lock").exists() for folder in folders)
    for folder in folders:
        folder.remove()
"""


async def test_processes_that_make_folders_at_the_same_time_never_sweep_each_others(tmp_path: Path) -> None:
    makers = [
        await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", MAKE_FOLDERS], env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        for _ in range(4)
    ]
    assert [await maker.wait() for maker in makers] == [0] * 4


# --- what finds a process, and what must not


async def test_processes_that_a_program_left_and_that_end_are_collected_while_it_runs(tmp_path: Path) -> None:
    program = (
        f"for n in 1 2 3; do (sh -c : &); done; echo $PPID > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/up; sleep 300"
    )
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        await session.submit_tasks([ComputeTask(executable="/bin/sh", arguments=["-c", program])])
        await wait_until((tmp_path / "up").exists)
        supervisor = int((tmp_path / "up").read_text())
        await wait_until(lambda: len(list(children_of(supervisor))) == 1)


async def test_a_program_that_shed_everything_ends_with_its_supervisor_and_with_its_keeper() -> None:
    """It has no mark, no session and no output of the engine's: only whose child it is tells."""
    for role in ("keeper", "supervisor"):
        async with engine("local", stray=" >/dev/null 2>&1") as found:
            for pid in found.living(role):
                os.kill(pid, KILL)
            assert found.owner.stdin is not None
            found.owner.stdin.close()
            await gone(found)


async def test_a_keeper_that_is_stopped_is_killed_in_the_end_and_what_it_kept_ends() -> None:
    async with engine("local") as found:
        os.kill(found.living("keeper")[0], signal.SIGSTOP)
        found.owner.kill()
        await found.owner.wait()
        assert "the local engine of session s1; ended: processes" in (await reaped(found))[0]
        await gone(found)


async def test_engines_whose_owner_lives_are_left_alone(tmp_path: Path) -> None:
    async with engine("local") as found:
        keeper = found.living("keeper")[0]
        mark = command_of(keeper).partition("--mark ")[2].split()[0]
        folder = next(path for path in found.temporary.glob("rhapsody-*/*") if (path / f"{mark}.keeper").exists())
        async with opened(tmp_path, EngineRow(mark, "local", "s1", keeper, started_at(keeper), str(folder))) as ledger:
            assert await end_orphans(ledger) == []
            assert len(await ledger.engines()) == 1
        assert not [pid for pid, started in found.processes.items() if started_at(pid) != started]


CRAFTED: list[tuple[str, Callable[[int, int, str], EngineRow]]] = [
    ("an id that another process has since", lambda pid, at, home: EngineRow("ab" * 8, "vllm", "s", pid, at - 1, home)),
    (
        "the very same process, which is no keeper",
        lambda pid, at, home: EngineRow("ab" * 8, "vllm", "s", pid, at, home),
    ),
    ("a folder that is none of ours", lambda pid, at, home: EngineRow("ab" * 8, "local", "s", 0, 0, home)),
    ("an empty mark", lambda pid, at, home: EngineRow("", "dragon", "s", 0, 0, home)),
]


@pytest.mark.parametrize("craft", [craft for _, craft in CRAFTED], ids=[words for words, _ in CRAFTED])
async def test_what_a_wrong_row_names_is_not_touched(
    craft: Callable[[int, int, str], EngineRow], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with (home / "output").open("w") as output:
        stranger = await asyncio.create_subprocess_exec(
            *["sh", "-c", "sleep 300; :", "rhapsody_mcp.engine.keeper", "--mark", "ef" * 8],
            stdout=output,
            start_new_session=True,
        )
    try:
        async with opened(tmp_path, craft(stranger.pid, started_at(stranger.pid), str(home))) as ledger:
            assert await end_orphans(ledger) == []
            assert await ledger.engines() == []
        assert stranger.returncode is None and (home / "output").exists()
    finally:
        os.killpg(stranger.pid, KILL)
        await stranger.wait()


async def test_a_keeper_whose_id_another_process_has_since_is_not_looked_for(tmp_path: Path) -> None:
    """A process with a keeper's arguments that started at another time is somebody else's."""
    mark = "cd" * 8
    stranger = await asyncio.create_subprocess_exec(
        *["sh", "-c", "sleep 300; :", "rhapsody_mcp.engine.keeper", "--mark", mark], start_new_session=True
    )
    try:
        row = EngineRow(mark, "local", "s", stranger.pid, started_at(stranger.pid) + 1, "/tmp/none")
        async with opened(tmp_path, row) as ledger:
            assert await end_orphans(ledger) == []
        assert stranger.returncode is None
    finally:
        os.killpg(stranger.pid, KILL)
        await stranger.wait()


@asynccontextmanager
async def opened(folder: Path, row: EngineRow) -> AsyncIterator[Ledger]:
    ledger = Ledger(folder)
    ledger.open()
    try:
        await ledger.commit(PutEngine(row))
        yield ledger
    finally:
        await ledger.close()
