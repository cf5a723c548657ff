"""Tasks in a real container of Podman, whose image is made of the Python of the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from rhapsody_mcp.api import ComputeTask, Session, Source
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.states import Cause

pytestmark = [pytest.mark.anyio, pytest.mark.ci]

PYTHON = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
IMAGE = "localhost/rhapsody-mcp-test"


def libraries(*programs: Path) -> set[str]:
    told = (
        subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout for program in programs
    )
    return {path for text in told for path in re.findall(r"(/\S+)", text)}


def configure(folder: Path) -> str:
    """Podman asks for more files and processes than root may have inside of a container, and its first choice, crun,
    refuses a machine that has both versions of cgroups."""
    lines = ["[containers]", 'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]', "[engine]"]
    if shutil.which("runc"):
        lines.append('runtime = "runc"')
    (folder / "containers.conf").write_text("\n".join(lines))
    return f"{folder}/containers.conf"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with a shell and the standard library of Python, where Podman runs here."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTAINERS_CONF", configure(tmp_path_factory.mktemp("podman")))
    root, standard = tmp_path_factory.mktemp("root"), Path(sysconfig.get_path("stdlib"))
    left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__", "config-*", "*.a")
    shutil.copytree(standard, f"{root}{standard}", ignore=left_out, symlinks=True)
    programs = [Path(PYTHON), Path(os.path.realpath("/bin/sh"))]
    for file in [*map(str, programs), *libraries(*programs, *standard.rglob("*.so"))]:
        Path(f"{root}{file}").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, f"{root}{file}")
    for folder in ("bin", "tmp", "proc", "sys", "dev", "etc"):
        (root / folder).mkdir(exist_ok=True)
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to(programs[1])
    archive = subprocess.run(["tar", "-C", root, "-c", "."], capture_output=True, check=True).stdout
    subprocess.run(["podman", "import", "-", IMAGE], input=archive, capture_output=True, check=True)
    tried = subprocess.run(["podman", "run", "--rm", IMAGE, "/bin/sh", "-c", "true"], capture_output=True, text=True)
    if tried.returncode == 0:
        yield IMAGE
    subprocess.run(["podman", "rmi", "-f", IMAGE], capture_output=True, check=False)
    patch.undo()
    if tried.returncode:
        pytest.skip(f"podman runs no container here: {tried.stderr.strip()[-200:]}")


FACTS = """
def facts(value):
    import os
    from rhapsody_mcp.task import progress
    progress(1, 2)
    print("printed")
    with open("left.txt", "w") as file:
        file.write("left")
    return [value, os.environ["A"], os.path.exists("/usr/share")]
"""


async def test_a_function_and_a_program_run_in_an_image(image: str, tmp_path: Path) -> None:
    async with Session([LocalExecutionBackend(num_workers=1)], work_dir=tmp_path) as session:
        options = {"container": image, "python": PYTHON, "process_template": {"env": {"A": "7,8"}}}
        called = ComputeTask(Source(FACTS), args=[{"a": 1}], outputs=["left.txt"], task_backend_specific_kwargs=options)
        made = ComputeTask(Source("def f():\n    return {1, 2}"), task_backend_specific_kwargs=options)
        used = ComputeTask(Source("def f(x):\n    return sorted(x)"), args=[made], task_backend_specific_kwargs=options)
        shown = ComputeTask(executable="sh", arguments=["-c", "echo $A"], task_backend_specific_kwargs=options)
        slow = ComputeTask(
            executable="sh",
            arguments=["-c", "while true; do :; done"],
            task_backend_specific_kwargs={"container": image, "timeout": 3},
        )
        absent = ComputeTask(
            executable="true", task_backend_specific_kwargs={"container": "localhost/rhapsody-mcp-no-such-image"}
        )
        tasks = [called, made, used, shown, slow, absent]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=300)
    assert called.outcome is not None and called.outcome.error == ""
    assert called.return_value["result"] == [{"a": 1}, "7,8", False]
    assert list(called.return_value["files"]) == ["left.txt"]
    assert called.stdout == "printed\n" and called.progress is not None
    assert (used.return_value, shown.return_value, slow.cause) == ([1, 2], "7,8", Cause.TIMEOUT)
    assert absent.cause is Cause.INVALID and "did not start" in str(absent.exception)
