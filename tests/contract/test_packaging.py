"""What is installed holds all that is needed: cards, prompts, the shipped model, type information."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters

from tests.services import OwnService, own_service

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture
def service() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@pytest.mark.anyio
async def test_the_server_and_its_service_run_from_the_wheel_alone(
    distributions: dict[str, Path], tmp_path: Path, service: OwnService
) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    assert (tmp_path / "rhapsody_mcp" / "py.typed").is_file()
    assert (tmp_path / "rhapsody_mcp" / "shipped_model" / "weights" / "model.safetensors").is_file()
    server = StdioServerParameters(
        command=sys.executable,
        args=["-P", "-m", "rhapsody_mcp", "stdio", "--folder", str(service.folder)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    async with Client(server) as client:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        source = "def where():\n    import rhapsody_mcp\n    return rhapsody_mcp.__path__[0]"
        await client.call_tool("create_session", {"backends": ["local"]})
        await client.call_tool("submit_tasks", {"session": "session-1", "tasks": [{"name": "t", "source": source}]})
        await client.call_tool("wait_tasks", {"session": "session-1"})
        result = await client.call_tool("get_result", {"session": "session-1", "task": "t"})
    assert "submit_tasks" in tools
    assert result.structured_content is not None
    assert result.structured_content["result"] == str(tmp_path / "rhapsody_mcp")


def test_the_source_distribution_has_cards_prompts_documents_and_tests(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    wanted = [name for name in kept if name.startswith(("docs/", "tools/", "prompts/", "tests/", "rhapsody_mcp/"))]
    assert "tools/tasks/submit_tasks.md" in names
    assert not set(wanted) - names
