"""Each framework goes the whole story, over stdio and over HTTP, with its own client of a model's provider."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.behaviour.test_http import serving
from tests.frameworks.environments import FRAMEWORKS, python_of, versions
from tests.frameworks.model_server import ScriptedModel, scripted_model, tool_name
from tests.frameworks.story import LAST_WORD, Story
from tests.frameworks.table import read_table
from tests.services import OwnService, own_service

pytestmark = [pytest.mark.ci, pytest.mark.parametrize("framework", sorted(FRAMEWORKS))]

ROOT = Path(__file__).parents[2]
LONGEST_S = 240
PARAMETERS: dict[str, dict[str, Any]] = {
    snapshot.stem: json.loads(snapshot.read_text())["inputSchema"]["properties"]
    for snapshot in (ROOT / "tests" / "contract" / "snapshots").glob("*.json")
}


def tell(framework: str, server: str) -> tuple[Story, ScriptedModel]:
    """Let the recipe run with this server, until the story has ended."""
    with scripted_model(story := Story()) as model:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        environment |= model.environment | {"HAYSTACK_TELEMETRY_ENABLED": "False", "OTEL_SDK_DISABLED": "true"}
        recipe = [str(python_of(framework)), "-m", f"tests.frameworks.recipes.{framework}", server, "Run the pipeline."]
        ended = subprocess.run(
            recipe, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    assert not model.problem, model.problem
    assert ended.returncode == 0 and LAST_WORD in ended.stdout, ended.stdout[-3000:] + ended.stderr[-3000:]
    return story, model


def recording(service: OwnService, log: Path) -> str:
    """A command that starts the server, and writes down what passes."""
    command = [sys.executable, "-m", "tests.frameworks.wire", str(log), *service.command("stdio")]
    script = service.folder / "rhapsody-mcp"
    script.write_text(f"#!/bin/sh\ncd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}\n")
    script.chmod(0o700)
    return str(script)


def messages(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def waits(passed: list[dict[str, Any]]) -> list[float]:
    """How long each wait was allowed to last."""
    contents = [message.get("result", {}).get("structuredContent") or {} for message in passed]
    return [content["applied_timeout_s"] for content in contents if "applied_timeout_s" in content]


def said(passed: list[dict[str, Any]], pattern: str) -> str:
    """The one thing that is said wherever the pattern matches."""
    found = {match[1] for message in passed for match in re.finditer(pattern, json.dumps(message))}
    (text,) = found
    return text


def properties(tool: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a tool as a provider gets it."""
    function = tool.get("function", tool)
    schemas = [function[key] for key in ("parameters", "parameters_json_schema") if key in function]
    fields: dict[str, Any] = schemas[0]["properties"]
    return fields


def test_over_stdio_it_does_what_the_table_says(framework: str, tmp_path: Path) -> None:
    with own_service() as service:
        story, model = tell(framework, recording(service, log := tmp_path / "log"))
    assert_whole(model, has_fields=framework != "llama_index")
    passed = messages(log)
    row = read_table()[framework]
    assert row.version == versions(framework)[FRAMEWORKS[framework][0].partition("[")[0]]
    assert row.era == said(passed, r'(?:"protocolVersion"|/protocolVersion"): "([0-9-]+)"')
    assert row.name == said(passed, r'lientInfo": {"name": "([^"]+)"')
    assert (row.reply, row.pictures) == (story.seen["reply"], story.seen["pictures"])
    assert waits(passed) and not any("error" in message for message in passed)
    assert waits(passed)[0] == 4.0
    assert not any(message.get("method") == "notifications/cancelled" for message in passed)


def assert_whole(model: ScriptedModel, has_fields: bool) -> None:
    """Every tool reaches the provider, with all its parameters, and those of a task where the framework keeps them."""
    sent = {tool_name(tool): properties(tool) for tool in model.tools}
    for name, own in PARAMETERS.items():
        assert sent[name].keys() == own.keys(), name
    fields = sent["submit_tasks"]["tasks"].get("items", {}).get("properties", {})
    assert fields.keys() == (PARAMETERS["submit_tasks"]["tasks"]["items"]["properties"].keys() if has_fields else set())


def test_over_http_it_does_the_same(framework: str) -> None:
    with own_service() as service, serving("--port", "0", service=service) as (_, address):
        story, _ = tell(framework, address)
    row = read_table()[framework]
    assert (row.reply, row.pictures) == (story.seen["reply"], story.seen["pictures"])
