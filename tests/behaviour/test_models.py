"""What agents are told of the language models that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import open_agent, perform

pytestmark = pytest.mark.anyio
WRITES = "it writes one kind of labelled JSON sample whatever it is asked"
ANOTHER = "For another: create_session with model (a folder or a hub name) or endpoint_url."


class Shipped(ScriptedBackend):
    """Says that it serves the shipped model."""

    serves_shipped_model = True


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, model: str) -> None:
    snapshot = cache / f"models--{model.replace('/', '--')}" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()


async def test_whoever_opens_a_session_hears_what_the_shipped_model_is_and_which_others_are_here(cache: Path) -> None:
    for model in ("a/b", "gpt2", *(f"c/{number}" for number in range(5))):
        put(cache, model)
    (cache / "models--half--loaded").mkdir()
    async with open_agent(backend=Shipped(perform, name="vllm")) as agent:
        await agent.session()
        told = agent.texts[-1]
    assert f"- vllm serves the shipped model rhapsody-tiny, for trials: {WRITES}." in told
    assert f"Models on this machine: a/b, c/0, c/1, c/2, c/3, and 2 more. {ANOTHER}" in told


async def test_of_another_model_nothing_is_said(cache: Path) -> None:
    async with open_agent() as agent:
        await agent.session()
        assert "rhapsody-tiny" not in agent.texts[-1]


async def test_the_system_names_the_default_model_and_those_that_are_here(cache: Path) -> None:
    async with open_agent() as agent:
        await agent.call("describe_system")
        assert f"Default model: the shipped model rhapsody-tiny, for trials: {WRITES}." in agent.texts[-1]
        assert f"No other model is in {cache}. {ANOTHER}" in agent.texts[-1]
    put(cache, "a/b")
    async with open_agent(settings=Settings(default_model="a/b")) as agent:
        await agent.call("describe_system")
        assert "Default model: a/b. Models on this machine: a/b." in agent.texts[-1]


async def test_whoever_opens_a_session_hears_that_idle_engines_stop() -> None:
    async with open_agent(settings=Settings(engine_idle_s=60)) as agent:
        await agent.session()
        assert "one that has had no task for 60 s stops until the next (engine_idle_s)." in agent.texts[-1]
    async with open_agent(settings=Settings(engine_idle_s=None)) as agent:
        await agent.session()
        assert "Engines start with the first task that needs them.\n" in agent.texts[-1]
