"""No path leads out of where it may lead."""

from __future__ import annotations

from pathlib import Path

import pytest
from mcp import MCPError

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.settings import Settings
from tests.agents import ERAS, open_agent

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
ROOT = "rhapsody://sessions"
SECRET = "root:x:0:0"
OUT = ["../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "/etc/passwd", "%2fetc%2fpasswd", "..", "%00"]


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("out", [*OUT, "....//etc/passwd", "%252e%252e%252fetc", "..\\..\\etc", "\u2025/etc/passwd"])
async def test_no_address_of_a_resource_leads_to_a_file(out: str, era: str) -> None:
    async with open_agent(era) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"name": "a", "prompt": "x"}])
        await agent.call("wait_tasks", **SESSION)
        places = [
            "{}",
            "{}/statistics",
            "{}/tasks/a",
            "session-1/{}",
            "session-1/tasks/{}",
            "session-1/tasks/{}/stdout",
        ]
        for place in [*places, "session-1/tasks/a/{}"]:
            with pytest.raises(MCPError) as refused:
                await agent.client.read_resource(f"{ROOT}/{place.format(out)}")
            assert SECRET not in str(refused.value)
        for uri in (f"file://{out}", f"rhapsody:{out}", f"rhapsody://{out}"):
            with pytest.raises(MCPError):
                await agent.client.read_resource(uri)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/etc", "a\x00b", "a\nb", "%2e%2e", ""])
async def test_no_name_of_a_session_or_a_task_is_a_path(name: str) -> None:
    async with open_agent() as agent:
        await agent.refusal("create_session", name=name)
        await agent.session()
        for field in ("session", "task"):
            await agent.refusal("get_result", **{**SESSION, "task": "a", field: name})
        await agent.refusal("submit_tasks", **SESSION, tasks=[{"name": name, "prompt": "x"}])


async def test_where_folders_are_listed_exports_working_folders_and_files_stay_in_them(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    outside.mkdir()
    (allowed / "link").symlink_to(outside)
    async with open_agent(settings=Settings(allowed_folders=(allowed,))) as agent:
        await agent.session()
        for folder in (outside, f"{allowed}/../outside", allowed / "link", f"{allowed}-2", "/", "~"):
            text = await agent.refusal("export_session", **SESSION, folder=str(folder))
            assert "allowed_folders" in text
            task = {"executable": "/bin/ls", "cwd": str(folder)}
            assert "allowed_folders" in await agent.refusal("submit_tasks", **SESSION, tasks=[task])
        await agent.call("export_session", **SESSION, folder=str(allowed / "new"))
    assert not list(outside.iterdir())
    assert list((allowed / "new").iterdir())


async def test_an_export_overwrites_nothing_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with open_agent() as agent:
        await agent.session()
        first = await agent.call("export_session", **SESSION, folder=str(tmp_path))
        second = await agent.call("export_session", **SESSION, folder=str(tmp_path))
        text = await agent.refusal("export_session", **SESSION, folder="relative/folder")
        assert "an absolute path" in text
    assert first != second
    modes = modes_in(tmp_path)
    assert len(modes) == 6 and not any(mode & 0o077 for mode in modes)


def modes_in(folder: Path) -> list[int]:
    return [file.stat().st_mode for file in folder.iterdir()]


def test_where_folders_are_listed_the_settings_of_a_model_come_from_them(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(tmp_path)
    (tmp_path / "config.yaml").touch()
    settings = Settings(allowed_folders=(allowed,))
    session_config = SessionConfig(backends=("vllm",), config_file=str(allowed / "link" / "config.yaml"))
    with pytest.raises(InvalidRequest, match="allowed_folders"):
        plan_backends(session_config, settings)
