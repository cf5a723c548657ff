"""Trials of a session's setup lines: what becomes of those whose calls were given up."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import anyio
import pytest

from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.runtime import backend_factory
from rhapsody_mcp.runtime.backend_factory import SessionConfig, try_environment
from rhapsody_mcp.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Login shells that a test ends early leave nothing in the home of the person, such as the lock of pyenv."""
    monkeypatch.setenv("HOME", str(tmp_path))


def config(*lines: str) -> SessionConfig:
    return SessionConfig(environment=Environment(setup=lines))


async def give_up(wanted: SessionConfig) -> None:
    with anyio.move_on_after(0.1) as scope:
        await try_environment(wanted, Settings())
    assert scope.cancelled_caught


async def until_none_is_kept() -> None:
    with anyio.fail_after(20):
        while backend_factory._trials:  # noqa: ASYNC110 - that a trial is forgotten is no event
            await anyio.sleep(0.02)


async def test_a_failure_that_nobody_came_for_is_not_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend_factory, "_TRIAL_KEPT_S", 0.05)
    wanted = config("sleep 0.3", f"test -e {tmp_path}/there")
    await give_up(wanted)
    await until_none_is_kept()
    gc.collect()
    assert "never retrieved" not in caplog.text
    (tmp_path / "there").touch()
    await try_environment(wanted, Settings())


async def test_calls_at_a_time_for_the_same_lines_get_the_end_of_one_trial(tmp_path: Path) -> None:
    wanted = config(f"echo tried >>{tmp_path}/tries", "sleep 0.3", "false")
    calls = [try_environment(wanted, Settings()) for _ in range(3)]
    ends = await asyncio.gather(give_up(wanted), *calls, return_exceptions=True)
    assert [type(end) for end in ends] == [type(None), *3 * [InvalidSettings]]
    assert (tmp_path / "tries").read_text() == "tried\n"
    assert not backend_factory._trials


def test_a_trial_of_an_event_loop_that_has_ended_is_made_anew() -> None:
    wanted = config("sleep 0.3")

    async def leave() -> None:
        await give_up(wanted)

    asyncio.run(leave())
    asyncio.run(try_environment(wanted, Settings()))
    assert not backend_factory._trials
