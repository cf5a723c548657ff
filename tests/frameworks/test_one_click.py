"""What `rhapsody-mcp clients` prints, taken by the clients themselves and by the validators of the formats."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from zipfile import ZipFile

import pytest

from rhapsody_mcp import __version__
from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.clients import entries, server_command, write_bundle
from tests.frameworks.assistants import needs_assistants, run_in
from tests.frameworks.environments import python_of
from tests.services import OwnService, own_service

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@pytest.fixture
def command(service: OwnService) -> list[str]:
    return service.command("stdio")


def run(home: Path, line: str) -> str:
    """What the command line of a client prints."""
    ended = run_in(home, shlex.split(line), {}, 120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def server_of(command: list[str]) -> Mapping[str, Any]:
    return {"command": command[0], "args": command[1:]}


@needs_assistants
def test_claude_code_adds_the_server_and_connects(command: list[str], tmp_path: Path) -> None:
    run(tmp_path, entries(command)["Claude Code"])
    assert "Connected" in run(tmp_path, "claude mcp list")


@needs_assistants
def test_codex_adds_the_server(command: list[str], tmp_path: Path) -> None:
    run(tmp_path, entries(command)["Codex"])
    settings = tomllib.loads((tmp_path / ".codex" / "config.toml").read_text())
    assert settings["mcp_servers"]["rhapsody"] == server_of(command)


@needs_assistants
def test_gemini_adds_the_server(tmp_path: Path) -> None:
    run(tmp_path, entries(command := server_command())["Gemini CLI"])
    (settings,) = tmp_path.rglob("settings.json")
    assert json.loads(settings.read_text())["mcpServers"]["rhapsody"] == server_of(command)


def test_the_link_of_cursor_holds_the_server(command: list[str]) -> None:
    link = urlsplit(entries(command)["Cursor"])
    query = parse_qs(link.query)
    assert (link.scheme, link.netloc, link.path) == ("cursor", "anysphere.cursor-deeplink", "/mcp/install")
    assert query["name"] == ["rhapsody"] and json.loads(base64.b64decode(query["config"][0])) == server_of(command)


def test_the_link_of_vs_code_holds_the_server(command: list[str]) -> None:
    scheme, _, text = entries(command)["VS Code"].partition("?")
    assert scheme == "vscode:mcp/install"
    assert json.loads(unquote(text)) == {"name": "rhapsody", **server_of(command)}


@needs_assistants
@pytest.mark.parametrize("host", [None, "login.example.org"])
def test_the_bundle_is_one_for_its_own_validator(host: str | None, tmp_path: Path) -> None:
    write_bundle(bundle := tmp_path / "rhapsody.mcpb", server_command(host))
    with ZipFile(bundle) as opened:
        opened.extractall(tmp_path / "opened")
    assert "passes" in run(tmp_path, f"mcpb validate {tmp_path}/opened/manifest.json")
    manifest = json.loads((tmp_path / "opened" / "manifest.json").read_text())
    assert manifest["version"] == __version__ and len(manifest["tools"]) == len(read_cards())
    words = [manifest["user_config"]["program"]["default"], *manifest["server"]["mcp_config"]["args"]]
    assert words == server_command(host)


def test_what_is_printed_starts_this_installation() -> None:
    program, mode = server_command()
    assert Path(program).parent == Path(sys.executable).parent and mode == "stdio"
    assert server_command("hpc")[:2] == ["ssh", "hpc"] and shlex.split(server_command("hpc")[2]) == [program, mode]


def test_the_entry_for_the_registry_is_valid_and_of_this_version(tmp_path: Path) -> None:
    entry = json.loads((ROOT / "server.json").read_text())
    assert {entry["version"], entry["packages"][0]["version"]} == {__version__}
    assert f"<!-- mcp-name: {entry['name']} -->" in (ROOT / "README.md").read_text()
    (tmp_path / "server.json").write_text(json.dumps(entry))
    linter = python_of("registry").parent / "skillsaw"
    ended = subprocess.run([linter, "lint", tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0 and "mcp-registry" in ended.stdout, ended.stdout + ended.stderr
