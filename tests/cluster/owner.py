"""Runs tasks over the nodes of an allocation, and tells what it does in lines of JSON:

python -m tests.cluster.owner BACKEND FOLDER [OPTIONS]

Each function appends a line to a file of its own in FOLDER, then waits for the file `release` there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from rhapsody_mcp.api import ComputeTask, Part, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import RhapsodyError
from tests.processes import wait_until

BACKENDS = {"local": LocalExecutionBackend, "dragon": DragonExecutionBackendV3}
OWN_PROCESS: dict[str, Any] = {"process_template": {}}


def work(folder: str, name: str, wait: bool) -> str:
    """Note the start; the value is the node."""
    import os
    import socket
    import time

    with open(os.path.join(folder, f"task-{name}"), "a") as notes:
        notes.write(f"{socket.gethostname()} {os.getpid()}\n")
    while wait and not os.path.exists(os.path.join(folder, "release")):
        time.sleep(0.05)
    return socket.gethostname()


def tell(what: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": what, **facts}) + "\n")
    sys.stdout.flush()


async def main() -> None:
    name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    retries, modes = options.pop("retries", 0), options.pop("modes", None)
    shared = folder / "results" if options.pop("shared", False) else None
    began = time.monotonic()
    try:
        backend = await BACKENDS[name](**options)
    except RhapsodyError as error:
        tell("refused", kind=type(error).__name__, text=str(error), seconds=time.monotonic() - began)
        return
    backend_facts = backend.describe()
    async with Session([backend], folder=shared) as session:
        tell("ready", facts=backend_facts, seconds=time.monotonic() - began)
        if modes:
            await run_modes(session, *modes)
        else:
            await run_tasks(session, folder, retries)
        began = time.monotonic()
    tell("closed", seconds=time.monotonic() - began)


def make_tasks(folder: Path, retries: int) -> dict[str, ComputeTask]:
    """By name: functions that wait, in workers and in processes of their own, and functions that do not wait."""
    processes = OWN_PROCESS | {"cores": 0.5}  # so that all that waits runs at a time on two nodes of two cores
    kinds: list[tuple[str, int, dict[str, Any]]] = [("long", 3, {}), ("short", 40, {}), ("process", 2, processes)]
    names = [(f"{kind}{number}", keys) for kind, count, keys in kinds for number in range(count)]
    return {
        name: ComputeTask(
            work,
            args=(str(folder), name, not name.startswith("short")),
            retries=retries,
            task_backend_specific_kwargs=keys,
        )
        for name, keys in names
    }


def describe(task: ComputeTask) -> list[str | None]:
    """State, cause, error and node."""
    assert task.outcome is not None
    return [task.state.value, task.cause and task.cause.value, task.outcome.error, task.node]


def place() -> str:
    import socket

    return socket.gethostname()


def long_text() -> str:
    return place() * 100_000


def beginning(text: str) -> list[str]:
    return [place(), text[: len(place())], str(len(text))]


def on(node: str) -> dict[str, Any]:
    return {"process_template": {"policy": {"host_name": node}}}


async def run_modes(session: Session, first: str, second: str) -> None:
    """Run each mode of task: results and outputs are long, and go from node to node."""
    longs = [ComputeTask(long_text, task_backend_specific_kwargs=on(node)) for node in (first, second)]
    inputs = [
        ComputeTask(beginning, args=(long,), task_backend_specific_kwargs=on(node))
        for long, node in zip(longs, (second, first), strict=True)
    ]
    in_worker = ComputeTask(beginning, args=(longs[1],))
    program = ComputeTask(executable="head", arguments=["-c", "300000", "/dev/zero"])
    pinned = ComputeTask(executable="hostname", task_backend_specific_kwargs=on(second))
    write = ["-c", "hostname > kept.txt"]
    in_tmp = {"process_template": {**on(second)["process_template"], "cwd": "/tmp"}}
    kept = ComputeTask(executable="sh", arguments=write, outputs=["kept.txt"], task_backend_specific_kwargs=in_tmp)
    path = Part(kept, "/files/kept.txt")
    read = ComputeTask(executable="cat", arguments=[path], task_backend_specific_kwargs=on(first))
    job_keys = {"process_templates": [(4, {})], "ranks_per_node": 2}
    job = ComputeTask(executable="hostname", task_backend_specific_kwargs=job_keys)
    tasks = [*longs, *inputs, in_worker, program, pinned, kept, read, job]
    await session.submit_tasks(tasks)
    await asyncio.gather(*tasks)
    tell(
        "modes",
        longs=[[task.node, len(task.return_value)] for task in longs],
        inputs=[task.return_value for task in inputs],
        in_worker=[in_worker.node, in_worker.return_value],
        program=len(program.stdout or ""),
        pinned=[pinned.node, pinned.stdout],
        kept=[kept.node, read.node, read.return_value],
        job=[list(job.nodes), [(rank.stdout or "").strip() for rank in job.ranks]],
    )


async def run_tasks(session: Session, folder: Path, retries: int) -> None:
    tasks = make_tasks(folder, retries)
    await session.submit_tasks(list(tasks.values()))
    waiting = [folder / f"task-{name}" for name in tasks if not name.startswith("short")]
    await wait_until(lambda: all(file.exists() for file in waiting), 120)
    await wait_until(lambda: all(file.read_text() for file in waiting), 120)
    tell("running", where={file.name[5:]: file.read_text().split() for file in waiting})
    await session.wait_tasks(list(tasks.values()), timeout=300)
    ends = {name: describe(task) for name, task in tasks.items()}
    tell("ended", tasks=ends, notices=[notice.text for notice in session.notices])


asyncio.run(main())
