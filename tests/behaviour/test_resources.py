"""How a client reads sessions, tasks, logs and statistics without a tool, and hears of their changes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from mcp import Client, MCPError
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPDeprecationWarning
from mcp.types import INVALID_PARAMS, ResourceUpdatedNotification, TextResourceContents

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Stream, Value
from rhapsody_mcp.protocol.resource_updates import ResourceUpdates
from rhapsody_mcp.protocol.subscriptions import Subscriptions
from rhapsody_mcp.runtime.backend_factory import SessionConfig
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import ERAS, Agent, open_agent, perform

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
ROOT = "rhapsody://sessions"
HOME = f"{ROOT}/session-1"
TRAIN = f"{HOME}/tasks/train"
AT_ONCE = Settings(notice_interval_s=0)


async def submit(agent: Agent, *tasks: dict[str, Any]) -> None:
    await agent.call("submit_tasks", **SESSION, tasks=list(tasks))


class Ears:
    """Hears which resources changed."""

    def __init__(self) -> None:
        self._send, self._receive = anyio.create_memory_object_stream[str](10_000)
        self.heard: list[str] = []

    async def __call__(self, message: object) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            self._send.send_nowait(str(message.params.uri))

    async def next(self) -> str:
        self.heard.append(await self._receive.receive())
        return self.heard[-1]

    async def until(self, *uris: str) -> None:
        """Until each of these has been heard of."""
        while not set(uris) <= set(self.heard):
            await self.next()

    def rest(self) -> list[str]:
        """All that was heard of, with nothing more to wait for."""
        while self._receive.statistics().current_buffer_used:
            self.heard.append(self._receive.receive_nowait())
        return self.heard

    def close(self) -> None:
        self._send.close()
        self._receive.close()


@pytest.fixture
def ears() -> Any:
    opened = Ears()
    yield opened
    opened.close()


@pytest.fixture(params=ERAS)
async def agent(request: pytest.FixtureRequest, ears: Ears) -> AsyncIterator[Agent]:
    async with open_agent(request.param, settings=AT_ONCE, message_handler=ears) as opened:
        await opened.session()
        yield opened


@asynccontextmanager
async def subscribed(client: Client, *uris: str) -> AsyncIterator[None]:
    if client.protocol_version >= "2026":
        async with client.listen(resource_subscriptions=uris):
            yield
        return
    for uri in uris:
        await subscribe(client, uri)
    yield
    for uri in uris:
        with pytest.warns(MCPDeprecationWarning):
            await client.unsubscribe_resource(uri)


async def subscribe(client: Client, uri: str) -> None:
    with pytest.warns(MCPDeprecationWarning):
        await client.subscribe_resource(uri)


async def read(agent: Agent, uri: str) -> str:
    result = await agent.client.read_resource(uri)
    (content,) = result.contents
    assert isinstance(content, TextResourceContents)
    return content.text


async def read_json(agent: Agent, uri: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(await read(agent, uri)))


async def train(agent: Agent) -> None:
    await submit(agent, {"name": "train", "source": "def train():\n    return {'accuracy': 0.9}"})
    await agent.call("wait_tasks", **SESSION)


async def test_resources_say_what_the_tools_say(agent: Agent) -> None:
    await train(agent)
    listed = await agent.call("list_sessions")
    assert await read_json(agent, ROOT) == listed
    assert await read_json(agent, HOME) == listed["sessions"][0]
    assert await read_json(agent, f"{HOME}/statistics") == await agent.call("get_statistics", **SESSION)
    result = await agent.call("get_result", **SESSION, task="train")
    assert result["result"] == {"accuracy": 0.9}
    assert await read_json(agent, TRAIN) == result == await read_json(agent, f"{HOME}/tasks/task.000001")


async def test_a_task_that_has_not_ended_shows_its_state_and_an_empty_log(agent: Agent) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "train", "prompt": "x"})
    assert (await read_json(agent, TRAIN))["state"] in ("QUEUED", "RUNNING")
    assert await read(agent, f"{TRAIN}/stdout") == ""


@pytest.mark.parametrize("era", ERAS)
async def test_results_and_logs_are_cut(era: str, tmp_path: Path) -> None:
    log = tmp_path / "out"
    log.write_bytes(b"a" * 100_000 + b"the end")
    data = b'"' + b"x" * 20_000 + b'"'
    ended = Outcome(
        state=TaskState.DONE,
        started=1.0,
        ended=2.0,
        value=Value("json", "str", len(data), data),
        stdout=Stream("the end", str(log), 100_007),
        stderr=Stream("oops"),
    )
    async with open_agent(era, backend=ScriptedBackend(lambda *_: ended)) as agent:
        await agent.session()
        await submit(agent, {"name": "train", "executable": "/bin/run"})
        await agent.call("wait_tasks", **SESSION)
        text = await read(agent, TRAIN)
        assert len(json.loads(text)["result"]) == 8192 and len(text) < 16_384
        printed = await read(agent, f"{TRAIN}/stdout")
        assert len(printed) == 65_536 and printed.endswith("the end")
        assert await read(agent, f"{TRAIN}/stderr") == "oops"


async def test_a_result_that_is_too_long_says_so() -> None:
    data = json.dumps(list(range(300_000)), separators=(",", ":")).encode()
    ended = Outcome(
        state=TaskState.DONE, started=1.0, ended=2.0, value=Value("json", "list", len(data), data, length=300_000)
    )
    async with open_agent(backend=ScriptedBackend(lambda *_: ended)) as agent:
        await agent.session()
        await submit(agent, {"name": "train", "executable": "/bin/run"})
        await agent.call("wait_tasks", **SESSION)
        shown = json.loads(await read(agent, f"{TRAIN}/result"))
        assert (shown["start"], shown["total"]) == (0, 300_000) and "only the beginning" in shown["about"]
        assert shown["beginning"] == list(range(shown["end"])) and 0 < shown["end"] < 300_000


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        (f"{ROOT}/sesion-1", "unknown_session: "),
        (f"{HOME}/tasks/trian", "unknown_task: "),
        (f"{HOME}/tasks/trian/stderr", "unknown_task: "),
        (f"{ROOT}/sesion-1/statistics", "Call list_sessions to see what is open"),
    ],
)
async def test_an_unknown_id_is_refused_with_the_nearest_one(agent: Agent, uri: str, told: str) -> None:
    await train(agent)
    with pytest.raises(MCPError) as refused:
        await read(agent, uri)
    assert refused.value.error.code == INVALID_PARAMS and told in refused.value.error.message


async def test_each_task_of_a_for_each_can_be_read(agent: Agent) -> None:
    source = "def double(x):\n    return 2 * x"
    await submit(agent, {"name": "sweep", "source": source, "for_each": [3, 4], "args": [{"item": True}]})
    await agent.call("wait_tasks", **SESSION)
    for spelled in ("sweep[1]", "sweep%5B1%5D"):
        assert (await read_json(agent, f"{HOME}/tasks/{spelled}"))["result"] == 8


async def test_a_subscriber_hears_of_a_task_and_of_all_that_shows_it(agent: Agent, ears: Ears) -> None:
    agent.backend.may_finish.clear()
    shown = [ROOT, HOME, f"{HOME}/statistics", TRAIN]
    await submit(agent, {"name": "train", "prompt": "x"})
    with anyio.fail_after(600):
        async with subscribed(agent.client, *shown, f"{TRAIN}/stdout", f"{HOME}/tasks/task.000001/stderr"):
            agent.backend.may_finish.set()
            await ears.until(*shown, f"{TRAIN}/stdout", f"{HOME}/tasks/task.000001/stderr")
            assert (await read_json(agent, TRAIN))["state"] == "DONE"


async def test_a_subscriber_hears_when_sessions_open_and_close(agent: Agent, ears: Ears) -> None:
    with anyio.fail_after(600):
        async with subscribed(agent.client, ROOT, HOME):
            await agent.call("create_session", name="other")
            assert await ears.next() == ROOT
            await agent.call("close_session", **SESSION)
            await ears.until(HOME)


async def test_who_has_unsubscribed_hears_nothing_more(agent: Agent, ears: Ears) -> None:
    with anyio.fail_after(600):
        async with subscribed(agent.client, ROOT):
            pass
        async with subscribed(agent.client, f"{HOME}/statistics"):
            await train(agent)
            await ears.until(f"{HOME}/statistics")
    assert set(ears.rest()) == {f"{HOME}/statistics"}


@pytest.mark.parametrize("era", ERAS)
async def test_many_changes_at_once_make_one_notice(era: str, ears: Ears) -> None:
    async with open_agent(era, settings=Settings(notice_interval_s=3600), message_handler=ears) as agent:
        await agent.session()
        async with subscribed(agent.client, HOME):
            await submit(agent, *({"prompt": "x"} for _ in range(1000)))
            waited = await agent.call("wait_tasks", **SESSION)
            assert waited["counts"] == {"DONE": 1000}
    assert ears.rest() == [HOME]


@pytest.mark.parametrize("era", ERAS)
async def test_the_last_of_many_changes_is_not_lost(era: str, ears: Ears) -> None:
    settings = Settings(notice_interval_s=0.2)
    with anyio.fail_after(600):
        async with open_agent(era, settings=settings, message_handler=ears) as agent:
            await agent.session()
            async with subscribed(agent.client, HOME):
                agent.backend.may_finish.clear()
                await submit(agent, *({"prompt": "x"} for _ in range(1000)))
                await ears.next()
                agent.backend.may_finish.set()
                while (await read_json(agent, HOME))["counts"] != {"DONE": 1000}:
                    await ears.next()
    assert len(ears.heard) < 100


@pytest.mark.parametrize("leaves", ["says so", "just goes"])
@pytest.mark.parametrize("era", ERAS)
async def test_a_subscription_ends_with_its_connection(era: str, leaves: str) -> None:
    updates = ResourceUpdates(0)
    server = MCPServer("any", subscriptions=updates.bus)
    Subscriptions(server, updates, lambda uri: None).serve()
    async with Client(server, mode=cast(Any, era)) as client:
        if era == "legacy" and leaves == "just goes":
            await subscribe(client, ROOT)
            assert updates.watched == {ROOT}
        else:
            async with subscribed(client, ROOT):
                assert updates.watched == {ROOT}
            await client.list_tools()
            assert updates.watched == set()
    assert updates.watched == set()


@pytest.mark.parametrize("era", ERAS)
async def test_each_client_hears_of_what_it_subscribed_to(era: str, ears: Ears) -> None:
    updates, other = ResourceUpdates(0), Ears()
    server = MCPServer("any", subscriptions=updates.bus)
    Subscriptions(server, updates, lambda uri: None).serve()
    mode = cast(Any, era)
    with anyio.fail_after(600):
        async with (
            SessionRegistry(lambda _: [ScriptedBackend(perform)]) as sessions,
            Client(server, mode=mode, message_handler=ears) as one,
            Client(server, mode=mode, message_handler=other) as two,
        ):
            sessions.watch(updates.note_change)
            async with subscribed(one, HOME), subscribed(two, ROOT):
                await sessions.open(SessionConfig())
                await ears.until(HOME)
                await other.until(ROOT)
    assert (ears.rest(), other.rest()) == ([HOME], [ROOT])
    other.close()


async def test_one_subscriber_that_goes_leaves_the_others(agent: Agent, ears: Ears) -> None:
    with anyio.fail_after(600):
        async with subscribed(agent.client, ROOT):
            async with subscribed(agent.client, HOME):
                pass
            await train(agent)
            await ears.until(ROOT)


async def test_a_subscription_to_nothing_is_refused_with_what_is_near() -> None:
    async with open_agent("legacy") as agent:
        await agent.session()
        for uri, told in (
            (f"{ROOT}/sesion-1", "did you mean 'session-1'?"),
            (f"{HOME}/tasks/train", "unknown task 'train'"),
            ("rhapsody://tasks", "there is no resource at 'rhapsody://tasks'. Valid: rhapsody://sessions, "),
        ):
            with pytest.raises(MCPError) as refused:
                await subscribe(agent.client, uri)
            assert refused.value.error.code == INVALID_PARAMS and told in refused.value.error.message


async def test_a_client_subscribes_to_a_bounded_number_of_resources(agent: Agent) -> None:
    await submit(agent, *({"prompt": "x"} for _ in range(1001)))
    uris = [f"{HOME}/tasks/task.{number:06d}" for number in range(1, 1002)]
    with pytest.raises(MCPError, match="at most; subscribe to a session in place of its tasks"):
        async with subscribed(agent.client, *uris):
            pytest.fail("it was not refused")


async def test_the_server_says_that_resources_can_be_subscribed_to(agent: Agent) -> None:
    capabilities = agent.client.server_capabilities
    assert capabilities.resources and capabilities.resources.subscribe and capabilities.completions
