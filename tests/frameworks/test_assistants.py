"""Assistants of the command line go the whole story, each as it is installed, with the API of its own provider."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frameworks.assistants import MODULES, needs_assistants, run_in
from tests.frameworks.model_server import ScriptedModel, scripted_model
from tests.frameworks.story import LAST_WORD, Story
from tests.frameworks.table import read_assistants
from tests.frameworks.test_recipes import LONGEST_S, messages, recording, said, waits
from tests.services import own_service

pytestmark = [pytest.mark.ci, needs_assistants]

Settings = Callable[[Path, str, ScriptedModel], None]
"""Writes the settings of an assistant in its home, for this command of the server."""


def claude_settings(home: Path, command: str, model: ScriptedModel) -> None:
    server = {"type": "stdio", "command": command, "args": ["stdio"]}
    (home / ".claude.json").write_text(json.dumps({"mcpServers": {"rhapsody": server}}))


def codex_settings(home: Path, command: str, model: ScriptedModel) -> None:
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(
        f"""model = "scripted"
model_provider = "scripted"

[model_providers.scripted]
name = "scripted"
base_url = "{model.environment["OPENAI_BASE_URL"]}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"

[mcp_servers.rhapsody]
command = "{command}"
args = ["stdio"]
required = true
"""
    )


def gemini_settings(home: Path, command: str, model: ScriptedModel) -> None:
    (home / ".gemini").mkdir()
    servers = {"rhapsody": {"command": command, "args": ["stdio"]}}
    chosen = {"auth": {"selectedType": "gemini-api-key"}}
    (home / ".gemini" / "settings.json").write_text(json.dumps({"mcpServers": servers, "security": chosen}))


@pytest.mark.parametrize(
    ("name", "package", "settings", "words"),
    [
        ("Claude Code", "@anthropic-ai/claude-code", claude_settings, "claude --allowedTools mcp__rhapsody -p"),
        (
            "Codex",
            "@openai/codex",
            codex_settings,
            "codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox",
        ),
        ("Gemini CLI", "@google/gemini-cli", gemini_settings, "gemini --yolo --skip-trust -m gemini-2.5-pro -p"),
    ],
)
def test_it_does_what_the_table_says(name: str, package: str, settings: Settings, words: str, tmp_path: Path) -> None:
    with own_service() as service, scripted_model(story := Story()) as model:
        settings(tmp_path, recording(service, log := tmp_path / "log"), model)
        ended = run_in(tmp_path, [*words.split(), "Run the pipeline."], model.environment, LONGEST_S)
    assert not model.problem, model.problem
    assert ended.returncode == 0 and LAST_WORD in ended.stdout, ended.stdout[-3000:] + ended.stderr[-3000:]
    passed, row = messages(log), read_assistants()[name]
    assert row.version == json.loads((MODULES / package / "package.json").read_text())["version"]
    assert row.era == said(passed, r'"result": {.*"protocolVersion": "([0-9-]+)"')
    assert row.name == said(passed, r'lientInfo": {"name": "([^"]+)"')
    assert (row.reply, row.pictures) == (story.seen["reply"], story.seen["pictures"])
    assert waits(passed)[0] == 25.0
