"""Environments with packages: made once, whole or not at all. A stand-in takes the place of uv."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from tests.processes import family, wait_until

pytestmark = pytest.mark.anyio

UV = """#!/bin/sh
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin" && ln -s "$PYTHON" "$folder/bin/python"
    exit
fi
case "$*" in
    *slow*) sleep 600;;
    *wrong*) echo "first line"; echo "no such package as wrong" >&2; exit 3;;
esac
echo "$*" >> "$TOLD/installed"
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (program := tmp_path / "bin" / "uv").parent.mkdir()
    program.write_text(UV)
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("TOLD", str(tmp_path))
    return tmp_path


def caches(folder: Path, count: int) -> list[PackageCache]:
    return [PackageCache(folder / "environments", "") for _ in range(count)]


def left(folder: Path) -> list[str]:
    return [entry.name for entry in (folder / "environments").iterdir() if ".made-" in entry.name]


async def test_however_many_ask_at_the_same_time_it_is_made_once(told: Path) -> None:
    made = await asyncio.gather(*(cache.make("", ("b", "a")) for cache in caches(told, 5)))
    again = await caches(told, 1)[0].make(sys.executable, ("a", "b"))
    assert {*made, again} == {again} and os.access(f"{again}/bin/python", os.X_OK)
    assert len((told / "installed").read_text().splitlines()) == 1
    other = await caches(told, 1)[0].make("", ("a",))
    assert other != again


async def test_what_fails_is_told_with_its_last_lines_and_leaves_nothing(told: Path) -> None:
    (cache,) = caches(told, 1)
    with pytest.raises(InvalidTask, match=r"its packages \(wrong\) could .* first line \| no such package as wrong"):
        await cache.make("", ("wrong",))
    assert left(told) == []
    with pytest.raises(InvalidTask, match="/no/python does not exist"):
        await cache.make("/no/python", ("a",))


async def test_one_that_was_interrupted_does_not_count_as_made(told: Path) -> None:
    (cache,) = caches(told, 1)
    making = asyncio.create_task(cache.make("", ("slow",)))
    await wait_until(lambda: bool(family("sleep", "600")), 60)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    await wait_until(lambda: not family("sleep", "600"), 60)
    assert len(left(told)) == 1
    (told / "bin" / "uv").write_text(UV.replace("sleep 600", ":"))
    made = await cache.make("", ("slow",))
    assert left(told) == [Path(made).name]
