"""Runs AsyncFlow's own examples and tests on our backend: `python -m tests.integrations.asyncflow_own CHECKOUT`.

CHECKOUT is a copy of its repository; pytest-asyncio has to be installed. Run by hand, as no registry has the copy. The
examples of telemetry are left out: they need the package rhapsody.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import subprocess
import sys
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
from radical import asyncflow
from radical.asyncflow import backends, workflow_manager

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.integrations import AsyncFlowBackend

WITHIN_S = 600
REASONS = {
    "07-radical_execution_backend": "its task_description has keys of RADICAL-Pilot",
    "test_local_backend_prompt_task_raises_not_implemented": "names the class of the backend that refuses a prompt",
}
"""Why an example or a test fails on our backend alone, by its name."""


class StandIn(AsyncFlowBackend):
    """Is made as AsyncFlow's own backends are. Its session starts when it is awaited, and ends with the flow."""

    made = 0

    def __init__(self, executor: object = None, name: str = "default") -> None:
        super().__init__(Session([LocalExecutionBackend(num_workers=2)]), name=name)
        StandIn.made += 1

    def __await__(self) -> Generator[Any, None, Self]:
        return self._start().__await__()

    async def _start(self) -> Self:
        await self.session.run_hidden(ComputeTask(abs, args=(1,)))
        return self

    async def shutdown(self) -> None:
        await super().shutdown()
        await self.session.close()


class LocalStandIn(StandIn):
    """AsyncFlow's local backend runs programs in a shell where nothing else is said; the others do not."""

    async def submit_tasks(self, tasks: Sequence[dict[str, Any]]) -> None:
        for task in tasks:
            if task["executable"]:
                task["task_backend_specific_kwargs"] = {"shell": True, **task["task_backend_specific_kwargs"]}
        await super().submit_tasks(tasks)


def stand_in() -> None:
    """Put our backend in the place of those that run something."""
    for module in (asyncflow, backends, workflow_manager):
        vars(module)["LocalExecutionBackend"] = LocalStandIn
    package, theirs = ModuleType("rhapsody"), ModuleType("rhapsody.backends")
    for name in ("ConcurrentExecutionBackend", "DaskExecutionBackend", "DragonExecutionBackendV3"):
        vars(theirs)[name] = StandIn
    vars(theirs)["RadicalExecutionBackend"] = StandIn
    sys.modules |= {"rhapsody": package, "rhapsody.backends": theirs}


# --- as a plugin of pytest


def pytest_configure() -> None:
    stand_in()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = StandIn.made
    result = yield
    if StandIn.made > before:
        _on_ours.add(item.nodeid)
    return result


_on_ours: set[str] = set()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for outcome in ("passed", "failed", "error", "skipped"):
        reports = terminalreporter.stats.get(outcome, [])
        ours = sum(report.nodeid in _on_ours for report in reports)
        terminalreporter.write_line(f"{outcome}: {len(reports)}, of these {ours} on our backend")


# --- as a program


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=WITHIN_S)


def run_examples(checkout: Path) -> None:
    for file in sorted(checkout.glob("examples/0*.py")):
        ended = run("-m", "asyncflow_own", "--example", str(file), folder=checkout)
        print(f"{file.stem}: {'ran' if not ended.returncode else f'failed: {why(file.stem)}'}")
        if ended.returncode:
            print(f"  {(ended.stderr or ended.stdout).strip().splitlines()[-1][:300]}")


def run_tests(checkout: Path) -> None:
    """Those that fail on AsyncFlow's own backend too are not ours: CHECKOUT may be of another version."""
    pytest_line = ("-m", "pytest", "-q", "-rfE", "--tb=no", "-W", "ignore", "tests")
    theirs = failures(run(*pytest_line, folder=checkout))
    ours = run(*pytest_line, "-p", "asyncflow_own", folder=checkout)
    print(*(line for line in ours.stdout.splitlines() if "on our backend" in line), sep="\n")
    print(f"failed on AsyncFlow's own backend too: {len(failures(ours) & theirs)}")
    for name in sorted(failures(ours) - theirs):
        print(f"  {name}: {why(name.rpartition('::')[2])}")


def failures(ended: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.split()[1] for line in ended.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))}


def why(name: str) -> str:
    return REASONS.get(name, "not known")


if __name__ == "__main__":
    if sys.argv[1] == "--example":
        stand_in()
        asyncio.run(runpy.run_path(sys.argv[2])["main"]())
    elif find_spec("pytest_asyncio") is None:
        raise SystemExit("the tests of AsyncFlow need pytest-asyncio: pip install pytest-asyncio")
    else:
        run_examples(Path(sys.argv[1]).resolve())
        run_tests(Path(sys.argv[1]).resolve())
