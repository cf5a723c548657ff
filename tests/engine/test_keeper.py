"""What a keeper does with what its engine leaves in /dev/shm, whenever its owner dies."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.processes import wait_until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="segments have names in a file system on Linux alone"),
]

ENGINE = """
import os, pathlib, signal, sys, time
from multiprocessing import resource_tracker, shared_memory

moment, folder = sys.argv[1], pathlib.Path(sys.argv[2])


def make():
    segment = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(segment._name, "shared_memory")  # as if its tracker were killed
    (pathlib.Path(sys.argv[3]) / "made").write_text(segment.name)
    return segment


def end(*_):
    if moment == "stop":
        keep = make()
        while not any(keep.name in note.read_text() for note in folder.glob("*.segments")):
            time.sleep(0.01)
    os._exit(0)


signal.signal(signal.SIGTERM, end)
if moment == "run":
    keep = make()
(folder / "up").touch()
time.sleep(300)
"""


async def start(folder: Path, moment: str) -> asyncio.subprocess.Process:
    options = ["--name", "engine", "--log", str(folder / "log"), "--grace", "600"]
    keeper = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "rhapsody_mcp.engine.keeper", *options, "--"],
        *[sys.executable, "-c", ENGINE, moment, str(folder), str(folder.parent)],
        stdin=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    await wait_until((folder / "up").exists)
    return keeper


@pytest.mark.parametrize("moment", ["run", "stop"])
async def test_a_segment_that_an_engine_leaves_at_its_stop_is_removed(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    keeper = await start(folder, moment)
    assert keeper.stdin is not None
    keeper.stdin.close()  # as the owner's death does
    assert await keeper.wait() == 0
    made = (tmp_path / "made").read_text()
    assert made.startswith("psm_") and not (Path("/dev/shm") / made).exists()
