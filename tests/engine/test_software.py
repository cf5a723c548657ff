"""Functions and programs in a Python of the user, with packages, in a container, and after setup lines."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Condition, ForEach, Module, Part, Session, Source
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from tests.pythons import OTHER_VERSIONS, make_wheel, other_python

pytestmark = pytest.mark.anyio

VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"
FACTS = """
def facts(value, more=None):
    import importlib.util, os, sys
    from rhapsody_mcp.task import progress
    progress(1, 2, "half", loss=0.5)
    print("printed")
    with open("left.txt", "w") as file:
        file.write("left")
    return {
        "version": "{}.{}".format(*sys.version_info),
        "value": value,
        "more": more,
        "bare": not any(map(importlib.util.find_spec, ("msgspec", "pydantic", "mcp"))),
    }
"""
MAKE = """
class Point:
    def __init__(self, x):
        self.x = x

def make(x):
    return [Point(x), {1, 2}]
"""
USE = "def use(made, *more):\n    return [made[0].x, sorted(made[1]), *more]"


@pytest.fixture(scope="module", params=[LocalExecutionBackend, DragonExecutionBackendV3], ids=["local", "dragon"])
async def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    folder = tmp_path_factory.mktemp("work")
    cache = PackageCache(folder / "environments", str(folder))
    async with Session([request.param(num_workers=1)], work_dir=folder, package_cache=cache) as session:
        yield session


def function(text: str, *args: Any, outputs: tuple[str, ...] = (), **options: Any) -> ComputeTask:
    return ComputeTask(Source(text), args=args, outputs=outputs, task_backend_specific_kwargs=options)


def program(*command: str, **options: Any) -> ComputeTask:
    return ComputeTask(executable=command[0], arguments=command[1:], task_backend_specific_kwargs=options)


async def run(session: Session, *tasks: ComputeTask | ForEach) -> None:
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=300)


def read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


# --- python


@pytest.mark.parametrize("version", OTHER_VERSIONS)
async def test_a_function_runs_in_a_python_that_has_the_standard_library_alone(session: Session, version: str) -> None:
    python = other_python(version)
    value = {"a": [1, 2.5, None, "é", True], "b": "x" * 100_000}
    task = function(FACTS, value, python=python, outputs=("left.txt",))
    await run(session, task)
    assert task.state is TaskState.DONE, task.outcome
    result = task.return_value["result"]
    assert result == {"version": version, "value": value, "more": None, "bare": True}
    assert read(task.return_value["files"]["left.txt"]) == "left"
    assert task.stdout == "printed\n"
    assert task.progress is not None
    assert (task.progress.step, task.progress.message, task.progress.numbers) == (1, "half", {"loss": 0.5})


@pytest.mark.parametrize("version", OTHER_VERSIONS)
async def test_objects_go_from_task_to_task_of_the_same_python(session: Session, version: str) -> None:
    python = other_python(version)
    made = function(MAKE, 5, python=python)
    used = ComputeTask(
        Source(USE),
        args=[made],
        task_backend_specific_kwargs={"python": python, "process_templates": [(2, {})]},
    )
    here = function(USE, made)
    await run(session, made, used, here)
    assert used.return_value == [5, [1, 2]], used.outcome
    assert len(used.ranks) == 2
    assert made.state is TaskState.DONE and made.return_value is None
    assert "return_value is None" in made.notes[-1] and f"Python {version}" in made.notes[-1]
    assert here.cause is Cause.INVALID and "Give the task that reads it the same python" in str(here.exception)


@pytest.mark.parametrize("version", OTHER_VERSIONS[:1])
async def test_failures_in_another_python_are_told_as_in_a_worker(session: Session, version: str) -> None:
    python = other_python(version)
    raised = function("def f():\n    raise ValueError('no')", python=python)
    missing = function("def f():\n    import no_such_module", python=python)
    crashed = function("def f():\n    import os\n    os._exit(3)", python=python)
    slow = function("def f():\n    import time\n    time.sleep(60)", python=python, timeout=1)
    canceled = function("def f():\n    import time\n    time.sleep(60)", python=python)
    odd = function("def f():\n    import sys\n    return [float('nan'), 2**70, '\\ud800', {1: 2}]", python=python)
    tasks = [raised, missing, crashed, slow, odd]
    await session.submit_tasks([*tasks, canceled])
    await session.wait_tasks(tasks, timeout=60)
    await session.cancel(canceled)
    assert "ValueError: no" in str(raised.exception) and 'File "<source of f>", line 2' in raised.traceback
    assert python in str(missing.exception) and "packages" in str(missing.exception)
    assert (crashed.cause, slow.cause, canceled.state) == (Cause.CRASHED, Cause.TIMEOUT, TaskState.CANCELED)
    assert odd.return_value[1:] == [2**70, "\ud800", {1: 2}]


@pytest.mark.parametrize("version", OTHER_VERSIONS[:1])
async def test_a_program_finds_the_python_first_also_after_setup_lines_and_for_each_item(
    session: Session, version: str
) -> None:
    python = other_python(version)
    plain = program("python", "-c", VERSION, python=python)
    after_lines = program("python3", "-c", VERSION, python=python, setup=["true"])
    each = ForEach([1, 2], lambda item, _: function(FACTS, item, python=python))
    await run(session, plain, after_lines, each)
    assert (plain.return_value, after_lines.return_value) == (version, version)
    assert [each.return_value[index]["version"] for index in (0, 1)] == [version, version]


@pytest.mark.parametrize("version", OTHER_VERSIONS[:1])
async def test_what_is_defined_in_the_program_that_submits_does_not_go_into_another_version(
    session: Session, version: str
) -> None:
    python = other_python(version)
    with pytest.raises(InvalidTask, match=f"which is Python {version}.*travels as bytecode.*Source.*Module"):
        await session.submit_tasks([ComputeTask(lambda: 1, task_backend_specific_kwargs={"python": python})])
    with pytest.raises(InvalidTask, match="its arguments cannot go into"):
        await session.submit_tasks([function("def f(g):\n    return g()", lambda: 1, python=python)])
    same = ComputeTask(lambda: sys.prefix, task_backend_specific_kwargs={"python": sys.executable})
    module = ComputeTask(Module("math:sqrt"), args=[4], task_backend_specific_kwargs={"python": python})
    await run(session, same, module)
    assert (same.return_value, module.return_value) == (sys.prefix, 2.0)


async def test_a_python_that_is_none_is_refused_with_what_was_found(session: Session, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho python 3 8\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    for python, told in {
        "/no/such/python": "does not exist on",
        str(tmp_path): "is a folder without bin/python",
        "/bin/ls": "is no Python: asked for its version, it ended with exit code",
        str(old): "is Python 3.8, older than 3.10",
        "no-such-name": "does not exist on",
    }.items():
        with pytest.raises(InvalidTask, match=told) as refusal:
            await session.submit_tasks([program("true", python=python)])
        assert refusal.value.field == "python" and "Valid is an interpreter" in str(refusal.value)


@pytest.mark.parametrize("version", OTHER_VERSIONS[:1])
async def test_objects_of_a_sweep_are_joined_read_and_compared_in_the_python_that_made_them(
    session: Session, version: str
) -> None:
    python = other_python(version)
    each = ForEach([1, 2], lambda item, _: function(MAKE, item, python=python))
    more = ForEach(Part(each, "/0/1"), lambda item, _: function("def f(x):\n    return x", item, python=python))
    used = ComputeTask(
        Source("def use(runs):\n    return [run[0].x for run in runs]"),
        args=[each],
        when=Condition(each, "/1/1", exists=True),
        task_backend_specific_kwargs={"python": python},
    )
    await run(session, each, more, used)
    assert used.return_value == [1, 2], used.exception
    assert sorted(more.return_value) == [1, 2], more.outcome


# --- packages


async def test_packages_are_installed_once_and_their_programs_are_found(session: Session, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "greeting", "def hello():\n    print('hello')\n    return 0\n")
    text = "def f(x):\n    import greeting, sys\n    return [greeting.hello() + x, sys.prefix]"
    tasks = [function(text, number, packages=[wheel]) for number in range(3)]
    hello = program("greeting-hello", packages=[wheel])
    await session.submit_tasks([*tasks, hello])
    await asyncio.sleep(0)
    assert {task.held_until for task in (*tasks, hello)} == {"its packages are installed"}
    await session.wait_tasks([*tasks, hello], timeout=300)
    assert [task.return_value[0] for task in tasks] == [0, 1, 2], tasks[0].outcome
    assert len({task.return_value[1] for task in tasks}) == 1
    assert hello.return_value == "hello"


async def test_packages_that_cannot_be_installed_end_the_task_with_what_was_said(session: Session) -> None:
    task = program("true", packages=["/no/such/file-1.0-py3-none-any.whl"])
    after = program("true", packages=["/no/such/file-1.0-py3-none-any.whl"])
    await run(session, task, after)
    for one in (task, after):
        assert one.cause is Cause.INVALID and "could not be installed" in str(one.exception)
        assert "file-1.0-py3-none-any.whl" in str(one.exception)


async def test_a_task_that_waits_for_packages_can_be_canceled_and_its_installer_ends(
    session: Session, tmp_path: Path
) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    (source / "setup.py").write_text(f"import time\nopen({str(tmp_path / 'began')!r}, 'w')\ntime.sleep(600)\n")
    task = program("true", packages=[str(source)])
    await session.submit_tasks([task])
    await asyncio.wait_for(session.cancel(task), 30)
    assert task.state is TaskState.CANCELED and task.held_until == ""


async def test_what_is_no_list_of_requirements_is_refused(session: Session) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"packages": ["--index-url=http://x"]}, "is an option of pip"),
        ({"packages": "humanize"}, "valid is a list of requirements"),
        ({"packages": ["x"], "container": "image"}, "contradict each other"),
        ({"python": ""}, "valid is the path of an interpreter"),
        ({"setup": "module load cuda"}, "valid is a list of lines"),
    ]
    for options, told in wrong:
        with pytest.raises(InvalidTask, match=told):
            program("true", **options)


# --- setup lines


async def test_setup_lines_run_before_a_program_or_a_function(session: Session) -> None:
    lines = ["export A=5", "echo said nothing", "unset HOME"]
    shown = program("sh", "-c", "echo $A${HOME-none}", setup=lines)
    called = function("def f():\n    import os\n    return os.environ['A']", setup=lines)
    unknown = program("no-such-program", setup=lines)
    await run(session, shown, called, unknown)
    assert (shown.return_value, called.return_value) == ("5none", "5")
    assert unknown.cause is Cause.INVALID and "no program 'no-such-program'" in str(unknown.exception)


async def test_a_setup_line_that_fails_is_named_with_what_it_said(session: Session) -> None:
    failing = program("true", setup=["true", "echo no such module >&2; false", "true"])
    ending = function("def f():\n    pass", setup=["exit 4"])
    slow = program("true", setup=["sleep 60"], timeout=1)
    await run(session, failing, ending, slow)
    assert failing.cause is Cause.INVALID
    assert "'echo no such module >&2; false' ended with exit code 1: no such module" in str(failing.exception)
    assert ending.cause is Cause.INVALID and "'exit 4' ended with exit code 4" in str(ending.exception)
    assert slow.cause is Cause.TIMEOUT


# --- what a session gives to its tasks


async def test_tasks_that_name_no_software_have_that_of_the_session(tmp_path: Path) -> None:
    python = other_python(OTHER_VERSIONS[0])
    software = {"python": python, "setup": ["export A=session"]}
    async with Session([LocalExecutionBackend(num_workers=1)], work_dir=tmp_path, software=software) as session:
        here = function(FACTS, 1)
        shown = program("sh", "-c", 'echo $A; python3 -c "$0"', VERSION)
        other = program("sh", "-c", 'echo $A; python3 -c "$0"', VERSION, python=sys.executable)
        await run(session, here, shown, other)
    assert here.return_value["version"] == OTHER_VERSIONS[0]
    assert shown.return_value == f"session\n{OTHER_VERSIONS[0]}"
    assert other.return_value == "{}.{}".format(*sys.version_info)


# --- containers


async def test_without_a_runtime_a_container_is_refused_in_words_unless_setup_lines_bring_it(tmp_path: Path) -> None:
    (tmp_path / "image.sif").touch()
    (tmp_path / "bash").symlink_to("/bin/bash")
    (runtime := tmp_path / "module" / "apptainer").parent.mkdir()
    runtime.write_text('#!/bin/sh\nfor word; do last=$word; done\necho "$last"\n')
    runtime.chmod(0o700)
    nowhere = {"variables": {"PATH": str(tmp_path)}}
    async with Session([LocalExecutionBackend(num_workers=1, environment=nowhere)], work_dir=tmp_path) as session:
        task = program("true", container="image.sif")
        loaded = program("echo", "loaded", container="image.sif", setup=[f"PATH={runtime.parent}:$PATH"])
        await run(session, task, loaded)
    assert loaded.return_value == "loaded", loaded.exception
    assert task.cause is Cause.INVALID
    assert "container needs apptainer or singularity or podman, and none is on PATH" in str(task.exception)


APPTAINER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/called"
[ "$1" = exec ] || exit 9
while [ "$1" != "$IMAGE" ]; do shift; done
shift
exec env A="$APPTAINERENV_A" "$@"
"""


async def test_apptainer_gets_the_folders_the_variables_and_the_command(tmp_path: Path) -> None:
    """On a stand-in, which runs the command without an image."""
    image = tmp_path / "image.sif"
    image.touch()
    (bin := tmp_path / "bin").mkdir()
    (bin / "apptainer").write_text(APPTAINER)
    (bin / "apptainer").chmod(0o700)
    variables = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "IMAGE": str(image)}
    backend = LocalExecutionBackend(num_workers=1, environment={"variables": variables})
    async with Session([backend], work_dir=tmp_path) as session:
        shown = program("sh", "-c", "echo $A", container="image.sif", process_template={"env": {"A": "7,8"}})
        called = function(FACTS, [1], container="image.sif")
        absent = program("true", container="other.sif")
        await run(session, shown, called, absent)
    assert shown.return_value == "7,8"
    assert called.return_value["value"] == [1], called.outcome
    assert absent.cause is Cause.INVALID and "other.sif does not exist on" in str(absent.exception)
    commands = (bin / "called").read_text()
    assert f"--bind {tmp_path}" in commands and f"--pwd {tmp_path} {image} sh -c" in commands
