"""Faults of tasks that print, and are watched meanwhile."""

from __future__ import annotations

import asyncio
import re
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import replace

from tests.faults.pipeline import Pipeline
from tests.faults.processes import memory_of

__all__ = ["fill_disk_with_output", "kill_service_while_tasks_print", "watch_a_gigabyte"]

_LITTLE = 0.05
"""Of a core: the pipeline leaves no more."""
_SEEN = 100
_MOST_GROWTH = 200 << 20
_TALK = """
def talk(runs, name):
    import os, time
    with open(os.path.join(runs, name), "a") as file:
        file.write(f"{os.getpid()}\\n")
    for number in range(1, 10_000_000):
        print("line", number, flush=True)
        time.sleep(0.001)
"""
_TALK_SCRIPT = 'echo $$ >> "$1/$2"; n=0; while true; do n=$((n+1)); echo "line $n"; sleep 0.01; done'
_FLOOD_SCRIPT = 'echo $$ >> "$1/$2"; seq {last} >&2; while [ ! -e "$1/stop" ]; do sleep 0.1; done; echo "$3"'
_OVER_THE_DISK = 6_000_000
_GIGABYTE = 112_345_679
"""The last of the numbers whose lines are a gigabyte."""


async def kill_service_while_tasks_print(pipeline: Pipeline) -> None:
    """What had been seen of them, and what they printed before that, is there after the restart."""
    world, steps = pipeline.world, pipeline.steps
    await pipeline.record.submit(
        steps.source("talk", _TALK, value=None, cores=_LITTLE),
        steps.program("talk-program", script=_TALK_SCRIPT, cores=_LITTLE),
    )
    seen = {name: await _last_line(pipeline, name) for name in ("talk", "talk-program")}
    await world.kill(world.one("service"))
    await pipeline.record.ended(*seen)
    for name, last in seen.items():
        head = await _told(pipeline, name, "head", "stdout")
        assert head.startswith("line 1\nline 2\n"), head[:100]
        kept = _numbers(await _told(pipeline, name, "tail", "stdout"))
        assert max(kept) >= last, f"{name} had printed line {last}, and {max(kept)} is the last that was kept"


async def _last_line(pipeline: Pipeline, name: str) -> int:
    """The last line that is seen of a task that has printed a hundred."""
    until = {"task": name, "text": f"line {_SEEN}"}
    waited = await pipeline.record.client.call("wait_tasks", session=pipeline.record.session, until=until)
    assert waited["until"]["met"], waited
    return max(_numbers(await _told(pipeline, name, "tail", "stdout")))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]


async def _told(pipeline: Pipeline, name: str, end: str, stream: str) -> str:
    reply = await pipeline.record.client.call("get_result", session=pipeline.record.session, task=name, output=end)
    return str(reply.get(stream, ""))


async def fill_disk_with_output(pipeline: Pipeline) -> None:
    """The task goes on, and what there was room for is read while it runs and afterwards."""
    script = _FLOOD_SCRIPT.format(last=_OVER_THE_DISK)
    flood = pipeline.steps.program("flood", script=script, cores=_LITTLE)
    await pipeline.record.submit(replace(flood, read=False))  # there is no room for what it prints on stdout
    full = "the disk was full"
    until = {"task": "flood", "text": full}
    waited = await pipeline.record.client.call("wait_tasks", session=pipeline.record.session, until=until)
    assert waited["until"]["met"], waited
    for _ in ("while it runs", "afterwards"):
        head, tail = await _told(pipeline, "flood", "head", "stderr"), await _told(pipeline, "flood", "tail", "stderr")
        assert head.startswith("1\n2\n3\n") and full in tail, (head[:100], tail[-200:])
        (pipeline.world.runs / "stop").touch()
        await pipeline.record.ended("flood")
    assert full in await _told(pipeline, "flood", "tail", "stdout")


async def watch_a_gigabyte(pipeline: Pipeline) -> None:
    """By `logs --follow` and by an agent. Neither the service nor the command holds what is printed."""
    world = pipeline.world
    service = world.one("service")
    before = memory_of(service)
    script = _FLOOD_SCRIPT.format(last=_GIGABYTE)
    step = replace(pipeline.steps.program("flood", script=script, cores=_LITTLE), held=True)
    await pipeline.record.submit(step)
    await pipeline.record.running("flood")
    command = world.command("logs", pipeline.record.session, "flood", "--follow")
    logs = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env=world.env)
    following = asyncio.create_task(_read(logs))
    grown = 0
    while not (await _told(pipeline, "flood", "tail", "stderr")).endswith(f"\n{_GIGABYTE}\n"):
        grown = max(grown, memory_of(logs.pid, "VmHWM"))
    assert (await _told(pipeline, "flood", "head", "stderr")).startswith("1\n2\n3\n")
    reply = await pipeline.record.client.call("get_result", session=pipeline.record.session, task="flood")
    assert reply["stderr_bytes"] > 1_000_000_000, reply
    (world.runs / "stop").touch()
    begin, end, gaps = await following
    assert begin.startswith(b"1\n2\n3\n") and end.endswith(b"\n%d\n" % _GIGABYTE), (begin[:100], end[-100:])
    assert gaps, "no line says what was left out"
    assert grown < _MOST_GROWTH, f"the command took {grown >> 20} MB"
    grown = memory_of(service, "VmHWM") - before
    assert grown < _MOST_GROWTH, f"the service grew by {grown >> 20} MB"


async def _read(logs: Process) -> tuple[bytes, bytes, int]:
    """The first and the last of what the command writes, and how many lines say that something was left out."""
    assert logs.stderr is not None
    begin, end, gaps = b"", b"", 0
    while data := await logs.stderr.read(1 << 16):
        gaps += data.count(b" bytes left out here ...]")
        begin, end = begin or data, (end + data)[-1000:]
    assert await logs.wait() == 0
    return begin, end, gaps
