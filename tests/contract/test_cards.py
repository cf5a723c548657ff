"""What the model is told: every card, and everything that a card says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp.types import Tool

from rhapsody_mcp.cards import Annotations, Card, read_cards, read_prompt
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.toolsets.tooling.card_tool import make_tools
from tests.agents import ERAS, open_agent, wire
from tests.contract.count_tokens import count_tokens
from tests.slurm_stand_in import SlurmStandIn

CARDS = read_cards()
SNAPSHOTS = Path(__file__).parent / "snapshots"
EXAMPLES = [
    pytest.param(card, example, id=f"{card.name}-{number}")
    for card in CARDS
    for number, example in enumerate(card.examples, 1)
]
#: Words in code spans that are neither tools nor parameters.
VALUES = {
    *("dragon", "local", "vllm", "endpoint", "next_cursor", "next_start"),
    *("invalid_task", "backend_unavailable", "unknown_session"),
}


async def offered(era: str = "auto") -> list[Tool]:
    async with open_agent(era) as agent:
        return (await agent.client.list_tools()).tools


def wire_form(tool: Tool) -> dict[str, Any]:
    return tool.model_dump(mode="json", by_alias=True, exclude_none=True)


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_every_tool_looks_on_the_wire_as_its_snapshot(era: str) -> None:
    tools = {tool.name: wire_form(tool) for tool in await offered(era)}
    if os.environ.get("UPDATE_SNAPSHOTS"):
        write_snapshots(tools)
    assert {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in SNAPSHOTS.glob("*.json")} == tools


def write_snapshots(tools: dict[str, dict[str, Any]]) -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    for file in SNAPSHOTS.glob("*.json"):
        file.unlink()
    for name, form in tools.items():
        (SNAPSHOTS / f"{name}.json").write_text(wire(form), encoding="utf-8")


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("card", "example"), EXAMPLES)
async def test_every_example_works(
    card: Card, example: Any, era: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlurmStandIn(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # what a tool writes without a folder goes there
    async with open_agent(era) as agent:
        if "session" in example.arguments:
            await agent.session()
            await agent.call("submit_tasks", session="session-1", tasks=KNOWN_TASKS)
            await agent.call("wait_tasks", session="session-1")
        await agent.call(card.name, **example.arguments)


KNOWN_TASKS = [
    {"name": "numbers", "source": "def numbers():\n    return list(range(500))"},
    {"name": "train", "source": "def train():\n    return {'accuracy': 0.9}"},
    {"name": "sweep", "function": "builtins:abs", "args": [{"item": True}], "for_each": [1, "two", 3]},
]


@pytest.mark.anyio
async def test_every_name_in_prose_exists() -> None:
    tools = await offered()
    known = VALUES | {tool.name for tool in tools} | {name for tool in tools for name in fields(tool.input_schema)}
    prose = {card.name: card.text for card in CARDS} | {"instructions": read_prompt("instructions")}
    unknown = {(where, name) for where, text in prose.items() for name in names(text) if name not in known}
    assert not unknown


def names(text: str) -> Iterator[str]:
    """Identifiers in code spans."""
    for span in re.findall(r"`([^`]+)`", text):
        if re.fullmatch(r"[a-z_]+", span):
            yield span


def fields(schema: dict[str, Any]) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        yield name
        yield from fields(field)
        yield from fields(field.get("items", {}))


@pytest.mark.anyio
async def test_schemas_are_flat_and_every_parameter_is_described() -> None:
    for tool in await offered():
        form = wire(wire_form(tool))
        assert "$ref" not in form and "$defs" not in form
        for schema in (tool.input_schema, tool.output_schema or {}):
            assert schema["type"] == "object"
            assert not {"anyOf", "oneOf", "allOf"} & schema.keys()
        for name, field in tool.input_schema["properties"].items():
            assert field.get("description"), f"{tool.name}.{name}"


@pytest.mark.anyio
async def test_what_destroys_says_so_and_what_only_reads_says_so() -> None:
    tools = {tool.name: tool.annotations for tool in await offered()}
    assert all(hints is not None for hints in tools.values())
    reading = {name for name, hints in tools.items() if hints and hints.read_only_hint}
    destroying = {name for name, hints in tools.items() if hints and hints.destructive_hint}
    assert reading == {
        *("list_sessions", "wait_tasks", "list_tasks", "get_result", "get_statistics", "describe_system")
    }
    assert destroying == {"submit_tasks", "cancel_tasks", "close_session", "register_function"}


@pytest.mark.anyio
@pytest.mark.vllm  # its tokenizer
async def test_the_whole_list_stays_small() -> None:
    assert sum(count_tokens(tool.name) for tool in await offered()) < 6_000


class Stray:
    async def wander(self) -> str:
        raise NotImplementedError


HINTS = Annotations(read_only=True, destructive=False, idempotent=True, open_world=False)


def test_a_method_without_a_card_stops_the_server() -> None:
    with pytest.raises(RhapsodyError, match=r"the tool wander has no card: write tools/stray/wander.md"):
        make_tools([Stray()], [])


def test_a_card_without_a_method_stops_the_server() -> None:
    card = Card(toolset="stray", name="hover", title="", annotations=HINTS, examples=(), text="")
    wander = card.model_copy(update={"name": "wander"})
    with pytest.raises(RhapsodyError, match=r"tools/stray/hover.md has no tool"):
        make_tools([Stray()], [card, wander])


@pytest.mark.anyio
async def test_instructions_reach_the_client() -> None:
    async with open_agent("legacy") as agent:
        assert agent.client.instructions == read_prompt("instructions")
        assert isinstance(agent.sessions, SessionRegistry)
