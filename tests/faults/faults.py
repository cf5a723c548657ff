"""The faults: each breaks something in the middle of a pipeline, and returns when what it leads to can be seen."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from tests.agents import Refused
from tests.faults.disks import CannotMake
from tests.faults.lines import Gone
from tests.faults.pipeline import Pipeline
from tests.faults.processes import ended, memory_of, part
from tests.faults.record import Record
from tests.faults.steps import Step
from tests.processes import wait_until

__all__ = ["Fault"]

Fault: TypeAlias = Callable[[Pipeline], Awaitable[None]]
_PAGE = 4096
_DAY_S = 86_400.0
_GIGABYTE = 1_000_000_000
_HUGE_ARGUMENT = 3_000_000
_STREAM = 400
_MOST_GROWTH = 200 << 20

_MARK = """
    import os
    with open(os.path.join(runs, name), "a") as file:
        file.write(f"{os.getpid()}\\n")
"""
_HUGE = f"def huge(runs, name):{_MARK}    return 'x' * {_GIGABYTE}"
_WEIGH = f"def weigh(runs, name, text):{_MARK}    import hashlib\n    " + (
    "return [len(text), hashlib.sha256(text.encode()).hexdigest()]"
)
_PRINT = f"""def show(runs, name, size):{_MARK}
    for _ in range(size // 1_000_000):
        print("x" * 999_999)
    return size
"""
_FORKS = f"""def forks(runs, name):{_MARK}
    import time
    for _ in range(300):
        if not os.fork():
            time.sleep(600)
"""
_FORK = 'echo $$ >> "$1/$2"; for n in $(seq 300); do sleep 600 & done; wait'
_TRAP = f"""def trap(runs, name):{_MARK}
    class Trap:
        def __reduce__(self):
            return eval, ("1 / 0",)
    return Trap()
"""


def _weight(character: bytes, count: int) -> list[int | str]:
    """What weighing a text gives."""
    text = hashlib.sha256()
    for _ in range(count // 1_000_000):
        text.update(character * 1_000_000)
    return [count, text.hexdigest()]


# --- processes


def kill(name: str, by: signal.Signals) -> Fault:
    async def fault(pipeline: Pipeline) -> None:
        await pipeline.world.kill(pipeline.world.one(name), by=by)

    return fault


def kill_runner(file: str, by: signal.Signals) -> Fault:
    """The process that runs this step."""

    async def fault(pipeline: Pipeline) -> None:
        await pipeline.world.kill(pipeline.world.pid_in(file), by=by)

    return fault


def kill_all(*names: str) -> Fault:
    """In this order, each before anything could notice the one before."""

    async def fault(pipeline: Pipeline) -> None:
        await pipeline.world.kill(*[pipeline.world.one(name) for name in names])

    return fault


def kill_in_stream(name: str) -> Fault:
    """While hundreds of short tasks go by, so that some are at each point of their way when it dies."""

    async def fault(pipeline: Pipeline) -> None:
        pipeline.world.open_gate()
        await pipeline.record.wait()
        steps = [*(pipeline.steps.native(f"short-{number}") for number in range(_STREAM))]
        steps += [pipeline.steps.program(f"short-program-{number}") for number in range(_STREAM // 20)]
        await pipeline.record.submit(*(replace(step, may_be_lost=True) for step in steps), key="stream")
        await wait_until(lambda: len(list(pipeline.world.runs.glob("short-*"))) > _STREAM // 4)
        await pipeline.world.kill(pipeline.world.one(name))

    return fault


async def stop_worker(pipeline: Pipeline) -> None:
    """For good: nobody but the engine ends it."""
    worker = pipeline.world.pid_in("held-1")
    os.kill(worker, signal.SIGSTOP)
    async with asyncio.timeout(60):
        await ended(worker)


# --- the state folder


async def fill_disk(pipeline: Pipeline) -> None:
    """What cannot be accepted is refused in words, and what runs comes to its end; then there is room again."""
    pipeline.world.disk.fill()
    pipeline.world.open_gate()
    await _refused(pipeline, "full")
    await pipeline.record.ended("held-1", "held-2", "held-3", "program", "ranks")
    await pipeline.record.look()
    pipeline.world.disk.free()


async def fill_disk_and_kill_service(pipeline: Pipeline) -> None:
    """What was accepted before is there when there is room again, whatever the service could write in between."""
    pipeline.world.disk.fill()
    await _refused(pipeline, "full")
    await _kill_service(pipeline)
    pipeline.world.disk.free()


async def read_only_at_start(pipeline: Pipeline) -> None:
    """A service that starts on it is refused in words; then it can be written to again."""
    await _kill_service(pipeline)
    await wait_until(lambda: not part("host"), within_s=60)
    pipeline.world.disk.mount("-o", "remount,ro")
    pipeline.world.disk.must_refuse()
    said = await pipeline.world.refusal()
    assert "read-only" in said.lower(), said
    pipeline.world.disk.mount("-o", "remount,rw")


async def read_only_below_service(pipeline: Pipeline) -> None:
    """Nothing more is accepted; the service is ended for the disk to be mounted anew."""
    world = pipeline.world
    world.disk.mount("-o", "remount,abort")
    world.disk.must_refuse()
    await _refused(pipeline, "cannot be written")
    await _kill_service(pipeline)
    await wait_until(lambda: not part("host"), within_s=60)
    world.disk.unmount()
    world.disk.mount("-o", "loop", str(world.folder / "disk"))


async def damage_page(pipeline: Pipeline) -> None:
    """In the middle of the ledger. It is refused in words and left as it is; then its owner puts a copy back."""

    def damage(ledger: Path) -> None:
        data = bytearray(ledger.read_bytes())
        if len(data) < 4 * _PAGE:
            raise CannotMake(f"the ledger has only {len(data)} bytes")
        for page in range(1, len(data) // _PAGE):
            data[page * _PAGE : page * _PAGE + 64] = b"\xa5" * 64
        ledger.write_bytes(data)

    await _with_another_ledger(pipeline, damage, "damaged")


async def ledger_from_the_future(pipeline: Pipeline) -> None:
    """It is refused in words and left as it is."""

    def date(ledger: Path) -> None:
        with sqlite3.connect(ledger, isolation_level=None) as opened:
            opened.execute("PRAGMA user_version = 9999")
        opened.close()

    await _with_another_ledger(pipeline, date, "later version")


async def _with_another_ledger(pipeline: Pipeline, change: Callable[[Path], None], word: str) -> None:
    await _kill_service(pipeline)
    await wait_until(lambda: not part("host"), within_s=60)
    ledger = pipeline.world.state / "ledger.sqlite"
    files = {path: path.read_bytes() for path in ledger.parent.glob("ledger.sqlite*") if path.is_file()}
    with sqlite3.connect(ledger) as opened:  # what is in the log of changes goes into the file
        opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    opened.close()
    change(ledger)
    changed = hashlib.sha256(ledger.read_bytes()).digest()
    said = await pipeline.world.refusal()
    assert word in said and str(ledger) in said, said
    assert hashlib.sha256(ledger.read_bytes()).digest() == changed, "the ledger that was refused was changed"
    for path in ledger.parent.glob("ledger.sqlite*"):
        path.unlink()
    for path, data in files.items():
        path.write_bytes(data)


# --- the world around it


def jump(days: float) -> Fault:
    """The clock of the service jumps, and stays so."""

    async def fault(pipeline: Pipeline) -> None:
        clock = pipeline.world.clock
        clock.set(days * _DAY_S)
        await pipeline.record.client.call("wait_tasks", session=pipeline.record.session, timeout_s=1)
        if abs(clock.last_read - time.time() - days * _DAY_S) > _DAY_S / 24:
            raise CannotMake("the service does not read the clock that was set")

    return fault


async def remove_socket(pipeline: Pipeline) -> None:
    """A client that comes then reaches the same service."""
    world = pipeline.world
    service = world.one("service")
    world.socket.unlink()
    async with await world.connect() as line:
        sessions = (await line.call("list_sessions"))["sessions"]
    assert [session["session"] for session in sessions] == [pipeline.record.session]
    assert world.one("service") == service


async def take_port(pipeline: Pipeline) -> None:
    """A listener for HTTP is refused in words, and the service serves on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, stderr = await pipeline.world.run("http", "--port", port)
    assert code and port in stderr and "Traceback" not in stderr, stderr


async def race(pipeline: Pipeline) -> None:
    """The service is killed, and eight clients start it at once."""
    world = pipeline.world
    await _kill_service(pipeline)
    lines = await asyncio.gather(*(world.connect() for _ in range(8)))
    replies = await asyncio.gather(*(line.call("list_sessions") for line in lines))
    assert all([one["session"] for one in reply["sessions"]] == [pipeline.record.session] for reply in replies), replies
    await wait_until(lambda: len(part("service")) == 1)
    await asyncio.gather(*(line.close() for line in lines))


# --- calls


async def lose_reply(pipeline: Pipeline) -> None:
    """The bridge dies before it can hand on a reply; the call is repeated with its key."""
    await _lose_reply(pipeline, lambda: pipeline.world.kill(pipeline.world.one("bridge")))


async def lose_reply_with_service(pipeline: Pipeline) -> None:
    """The service dies at once after a call was sent, whether it has read it or not."""
    await _lose_reply(pipeline, lambda: _kill_service(pipeline))


async def _lose_reply(pipeline: Pipeline, lose: Callable[[], Awaitable[None]]) -> None:
    world, steps = pipeline.world, pipeline.steps
    sent = [steps.native("sent"), steps.program("sent-program"), steps.items("sent-items", pipeline.numbers)]
    assert world.client.line
    requests = [step.request for step in sent]
    await world.client.line.send(
        "submit_tasks", session=pipeline.record.session, tasks=requests, idempotency_key="sent"
    )
    await lose()
    await pipeline.record.submit(*sent, key="sent")
    await pipeline.record.submit(*sent, key="sent")


async def _refused(pipeline: Pipeline, word: str, step: Step | None = None) -> None:
    """A submission is refused in words that have this one in them."""
    step = step or pipeline.steps.native("refused")
    try:
        await pipeline.record.client.call("submit_tasks", session=pipeline.record.session, tasks=[step.request])
    except Refused as refused:
        assert word in str(refused).lower(), refused
    else:
        raise CannotMake("a submission was accepted that could not be")


async def _kill_service(pipeline: Pipeline) -> None:
    """Its client's bridge ends with it."""
    world = pipeline.world
    await world.kill(world.one("service"))
    if world.client.line is not None:
        try:
            await world.client.line.call("list_sessions")
        except Gone:
            return
        raise CannotMake("the bridge answers without a service")


# --- tasks that are too much


async def return_a_gigabyte(pipeline: Pipeline) -> None:
    """It goes on to another task, and the service does not hold it."""
    steps = pipeline.steps
    huge = steps.unread("huge", _HUGE)
    weighed = steps.source("weighed", _WEIGH, {"ref": "huge"}, value=_weight(b"x", _GIGABYTE))
    await _bounded(pipeline, huge, weighed)


async def print_a_gigabyte(pipeline: Pipeline) -> None:
    """A function and a program; the service does not hold what they print."""
    steps = pipeline.steps
    told = steps.source("printed", _PRINT, _GIGABYTE, value=_GIGABYTE)
    flood = steps.program("flood", script=f'echo $$ >> "$1/$2"; yes | head -c {_GIGABYTE} >&2; echo "$3"')
    await _bounded(pipeline, told, flood)


async def _bounded(pipeline: Pipeline, *more: Step) -> None:
    """Run these with the rest, and see that the service needs no memory for them."""
    service = pipeline.world.one("service")
    before = memory_of(service)
    await pipeline.record.submit(*more)
    pipeline.world.open_gate()
    await pipeline.record.wait()
    grown = memory_of(service, "VmHWM") - before
    assert grown < _MOST_GROWTH, f"the service grew by {grown >> 20} MB"


async def fork_300(pipeline: Pipeline) -> None:
    """In another session of the same service, where a limit leaves room for a hundred."""
    world, steps = pipeline.world, pipeline.steps
    session = (await world.client.call("create_session", backends=["local"], num_workers=1))["session"]
    neighbor = Record(world, session)
    await neighbor.submit(steps.program("warm"))
    await neighbor.wait()
    used = int((world.group / "pids.current").read_text())
    (world.group / "pids.max").write_text(str(used + 100))
    await neighbor.submit(steps.source("forks", _FORKS, value="", process=True), steps.program("forks-program", _FORK))
    await neighbor.wait()
    (world.group / "pids.max").write_text("max")
    if (world.group / "pids.events").read_text().split() == ["max", "0"]:
        raise CannotMake("300 forks did not reach the limit")
    assert not await neighbor.check({"forks": "error", "forks-program": "exit_code"}, {})


async def return_what_cannot_be_pickled(pipeline: Pipeline) -> None:
    """Also what can be written and not read again, an argument of megabytes, and one that is longer than a request."""
    steps, text = pipeline.steps, "x" * _HUGE_ARGUMENT
    await pipeline.record.submit(
        steps.source("lock", "def lock(runs, name):\n    import threading\n    return threading.Lock()", value=""),
        steps.unread("trap", _TRAP),
        steps.source("trapped", "def trapped(runs, name, trap):\n    return 1", {"ref": "trap"}, value=""),
        steps.source("long", _WEIGH, text, value=_weight(b"x", _HUGE_ARGUMENT)),
    )
    await _refused(pipeline, "request_bytes", steps.source("longer", _WEIGH, text + text, value=None))
