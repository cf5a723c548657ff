"""A client that declares the Tasks extension gets a handle for a call that waits, and polls for the result."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self, cast

import anyio
import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim, advertise
from mcp.client.streamable_http import streamable_http_client
from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
from mcp.server.auth.middleware.bearer_auth import BearerAuthBackend
from mcp.server.auth.provider import AccessToken
from mcp.types import (
    CallToolResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
    Request,
    RequestParams,
    Result,
)
from pydantic import TypeAdapter
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.types import ASGIApp

from rhapsody_mcp.protocol.task_store import HandleStore, InMemoryHandleStore
from rhapsody_mcp.protocol.tasks_extension import TASKS, TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import Server, build_server
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from rhapsody_mcp.toolsets.tooling.deferred import ask_later
from tests.agents import perform, text_of

pytestmark = pytest.mark.anyio

SESSION = {"session": "session-1"}
MISSING_CAPABILITY, METHOD_NOT_FOUND, INVALID_PARAMS, HEADER_MISMATCH = -32021, -32601, -32602, -32020


class TaskParams(RequestParams):
    task_id: str
    input_responses: dict[str, Any] | None = None


class TaskRequest(Request[TaskParams, Literal["tasks/get", "tasks/update", "tasks/cancel"]]):
    name_param = "taskId"


class Unnamed(Request[TaskParams, Literal["tasks/get"]]):
    """Sent over HTTP, it lacks the header that names the task."""


class Created(Result):
    """The answer to a call that became a task."""

    result_type: Literal["task"] = "task"
    task_id: str
    status: str
    ttl_ms: int
    poll_interval_ms: int


class Polls(ClientExtension):
    """A client's half of the extension, as a host would have it."""

    identifier = TASKS

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=Created, resolve=self.resolve)]

    async def resolve(self, created: Created, context: ClaimContext) -> CallToolResult:
        done = await Waits(context.session).settled(created.task_id)
        return CallToolResult.model_validate(done["result"])


class Waits:
    """Speaks the three methods of the extension."""

    def __init__(self, session: Any) -> None:
        self.session = session

    async def send(self, method: Any, task_id: str, answers: dict[str, Any] | None = None) -> dict[str, Any]:
        request = TaskRequest(method=method, params=TaskParams(task_id=task_id, input_responses=answers))
        return cast(dict[str, Any], await self.session.send_request(request, TypeAdapter(dict[str, Any])))

    async def get(self, task_id: str) -> dict[str, Any]:
        return await self.send("tasks/get", task_id)

    async def settled(self, task_id: str) -> dict[str, Any]:
        """As it is once it works no more."""
        with anyio.fail_after(600):
            while (task := await self.get(task_id))["status"] == "working":
                await anyio.lowlevel.checkpoint()
        return task

    async def refusal(self, method: Any, task_id: str) -> int:
        with pytest.raises(MCPError) as caught:
            await self.send(method, task_id, {})
        return caught.value.error.code


class House:
    """A server on a scripted backend whose one session has a task that runs until the gate opens."""

    def __init__(self, server: Server, sessions: SessionRegistry, backend: ScriptedBackend) -> None:
        self.server, self.sessions, self.backend = server, sessions, backend
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.stack.__aenter__()
        return self

    async def __aexit__(self, *ended: Any) -> None:
        await self.stack.__aexit__(*ended)

    async def client(self, era: str = "auto", *, declares: ClientExtension | None, **options: Any) -> Client:
        extensions = [declares] if declares else []
        client = Client(self.server, mode=cast(Any, era), extensions=extensions, **options)
        return await self.stack.enter_async_context(client)

    async def states(self) -> list[str]:
        return [task.state.value for task in self.sessions.get("session-1").session.tasks]


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 8, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@asynccontextmanager
async def open_house(store: HandleStore | None = None, clock: Clock | None = None) -> AsyncIterator[House]:
    backend = ScriptedBackend(perform)
    backend.may_finish.clear()
    async with SessionRegistry(lambda _: [backend]) as sessions, TasksExtension(store, clock or Clock()) as tasks:
        async with House(build_server(Settings(wait_cap_s=0.01), sessions, [tasks]), sessions, backend) as house:
            plain = await house.client(declares=None)
            await plain.call_tool("create_session", {})
            await plain.call_tool("submit_tasks", {**SESSION, "tasks": [{"name": "held", "prompt": "x"}]})
            yield house


async def created(client: Client, tool: str, **arguments: Any) -> Created:
    """The handle that this call gives."""
    result = await client.session.call_tool(tool, arguments, allow_claimed=True)
    assert isinstance(result, Created), result
    return result


async def test_a_wait_gives_a_handle_at_once_and_its_result_later() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        waits = Waits(client.session)
        handle = await created(client, "wait_tasks", **SESSION)
        assert handle.status == "working" and handle.ttl_ms > 0
        assert (await waits.get(handle.task_id))["status"] == "working"
        house.backend.may_finish.set()
        told = await waits.settled(handle.task_id)
        assert told["status"] == "completed" and told["resultType"] == "complete"
        assert told["result"]["structuredContent"]["ended"] is True
        assert await waits.settled(handle.task_id) == told


async def test_a_wait_with_a_handle_is_not_cut_at_the_servers_cap() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        handle = await created(client, "wait_tasks", **SESSION, timeout_s=3600)
        house.backend.may_finish.set()
        result = (await Waits(client.session).settled(handle.task_id))["result"]["structuredContent"]
        assert (result["asked_timeout_s"], result["applied_timeout_s"]) == (3600, 3600)


async def test_a_client_with_the_extension_sees_the_result_of_the_call() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        house.backend.may_finish.set()
        result = await client.call_tool("wait_tasks", SESSION)
        assert result.structured_content and result.structured_content["ended"]


async def test_what_does_not_wait_gives_no_handle() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        calls: list[tuple[str, dict[str, Any]]] = [
            ("list_tasks", SESSION),
            ("wait_tasks", {**SESSION, "timeout_s": 0}),
            ("wait_tasks", {"session": "other"}),
            ("wait_tasks", {**SESSION, "task": "held"}),
            ("close_session", SESSION),
            ("no_such_tool", {}),
        ]
        for tool, arguments in calls:
            result = await client.session.call_tool(tool, arguments, allow_claimed=True)
            assert isinstance(result, CallToolResult), tool
        assert await house.states() == ["RUNNING"]


@pytest.mark.parametrize(
    ("era", "declares"),
    [("auto", None), ("legacy", None), ("legacy", advertise(TASKS))],
    ids=["undeclared", "legacy", "legacy declared"],
)
async def test_every_other_client_gets_plain_results(era: str, declares: ClientExtension | None) -> None:
    async with open_house() as house:
        client = await house.client(era, declares=declares)
        result = await client.call_tool("wait_tasks", SESSION)
        assert result.structured_content and result.structured_content["applied_timeout_s"] == 0.01
        knows = await house.client(declares=Polls())
        handle = await created(knows, "wait_tasks", **SESSION)
        code = MISSING_CAPABILITY if era == "auto" else METHOD_NOT_FOUND
        for method in ("tasks/get", "tasks/update", "tasks/cancel"):
            assert await Waits(client.session).refusal(method, handle.task_id) == code


async def test_a_canceled_wait_harms_no_task() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        waits = Waits(client.session)
        handle = await created(client, "wait_tasks", **SESSION)
        assert (await waits.send("tasks/cancel", handle.task_id))["resultType"] == "complete"
        assert (await waits.settled(handle.task_id))["status"] == "cancelled"
        assert await house.states() == ["RUNNING"]
        house.backend.may_finish.set()
        again = await client.call_tool("wait_tasks", SESSION)
        assert again.structured_content and again.structured_content["counts"] == {"DONE": 1}
        await waits.send("tasks/cancel", handle.task_id)
        assert (await waits.get(handle.task_id))["status"] == "cancelled"


@pytest.mark.parametrize("tool", ["cancel_tasks", "close_session"])
async def test_what_ends_tasks_gives_a_handle_and_its_result_says_how_many(tool: str) -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())
        choice = {"all_open": True} if tool == "cancel_tasks" else {}
        handle = await created(client, tool, **SESSION, **choice, force=True)
        told = await Waits(client.session).settled(handle.task_id)
        assert told["result"]["structuredContent"]["canceled"] == 1


async def test_questions_come_before_the_handle() -> None:
    asked: list[str] = []

    async def say_yes(_: Any, params: Any) -> ElicitResult:
        asked.append(params.message)
        return ElicitResult(action="accept", content={})

    async with open_house() as house:
        client = await house.client(declares=Polls(), elicitation_callback=say_yes)
        first = await client.session.call_tool("close_session", SESSION, allow_input_required=True, allow_claimed=True)
        assert isinstance(first, InputRequiredResult) and await house.states() == ["RUNNING"]
        result = await client.call_tool("close_session", SESSION)
        assert len(asked) == 1 and result.structured_content and result.structured_content["canceled"] == 1


async def test_a_result_outlives_the_connection_that_asked_for_it() -> None:
    async with open_house() as house:
        async with Client(house.server, extensions=[Polls()]) as leaves:
            handle = await created(leaves, "wait_tasks", **SESSION)
        house.backend.may_finish.set()
        client = await house.client(declares=Polls())
        assert (await Waits(client.session).settled(handle.task_id))["status"] == "completed"


async def test_a_refusal_after_the_handle_is_a_result() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())

        async def asks() -> str:
            raise ValueError(str(await ask_later({"sure": question("Sure?")})))

        house.server.add_tool(asks)
        handle = await created(client, "asks")
        waits = Waits(client.session)
        assert (await waits.settled(handle.task_id))["status"] == "input_required"
        await waits.send("tasks/update", handle.task_id, {"sure": {"action": "accept"}})
        told = await waits.settled(handle.task_id)
        assert (told["status"], told["result"]["isError"]) == ("completed", True)


async def test_a_call_with_a_handle_asks_and_is_answered_one_by_one() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())

        async def asks() -> str:
            answers = await ask_later({"name": question("Name?"), "sure": question("Sure?")})
            return " ".join(f"{key}={answer['action']}" for key, answer in sorted(answers.items()))

        house.server.add_tool(asks)
        handle = await created(client, "asks")
        waits = Waits(client.session)
        told = await waits.settled(handle.task_id)
        assert told["status"] == "input_required" and set(told["inputRequests"]) == {"name", "sure"}
        assert told["inputRequests"]["name"]["params"]["message"] == "Name?"
        await waits.send("tasks/update", handle.task_id, {"name": {"action": "accept"}, "other": {"action": "accept"}})
        assert set((await waits.get(handle.task_id))["inputRequests"]) == {"sure"}
        await waits.send("tasks/update", handle.task_id, {"sure": {"action": "decline"}})
        told = await waits.settled(handle.task_id)
        assert told["result"]["content"][0]["text"] == "name=accept sure=decline" and "inputRequests" not in told


def question(message: str) -> ElicitRequest:
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema={"type": "object"}))


async def test_a_protocol_error_makes_a_handle_failed() -> None:
    async with open_house() as house:
        client = await house.client(declares=Polls())

        async def fails() -> str:
            await ask_later({"sure": question("Sure?")})
            raise MCPError(code=-32603, message="no more")

        house.server.add_tool(fails)
        handle = await created(client, "fails")
        waits = Waits(client.session)
        await waits.settled(handle.task_id)
        await waits.send("tasks/update", handle.task_id, {"sure": {"action": "accept"}})
        told = await waits.settled(handle.task_id)
        assert (told["status"], told["error"], told["statusMessage"]) == (
            "failed",
            {"code": -32603, "message": "no more"},
            "no more",
        )
        assert "result" not in told


async def test_a_handle_expires_an_hour_after_its_call_ended() -> None:
    clock = Clock()
    async with open_house(clock=clock) as house:
        client = await house.client(declares=Polls())
        waits = Waits(client.session)
        handle = await created(client, "wait_tasks", **SESSION)
        clock.time += timedelta(hours=2)
        assert (await waits.get(handle.task_id))["status"] == "working"
        house.backend.may_finish.set()
        told = await waits.settled(handle.task_id)
        assert told["ttlMs"] == 3 * 3600 * 1000
        clock.time += timedelta(minutes=59)
        assert await waits.get(handle.task_id) == told
        clock.time += timedelta(minutes=1)
        assert await waits.refusal("tasks/get", handle.task_id) == INVALID_PARAMS


class Full(InMemoryHandleStore):
    def count(self, owner: str | None) -> int:
        return 1_000_000


async def test_one_who_holds_too_many_handles_waits_like_any_other() -> None:
    async with open_house(store=Full()) as house:
        client = await house.client(declares=Polls())
        result = await client.session.call_tool("wait_tasks", SESSION, allow_claimed=True)
        assert isinstance(result, CallToolResult) and "Not all have ended" in text_of(result)


async def test_a_server_that_stops_ends_the_waits() -> None:
    store = InMemoryHandleStore()
    async with open_house(store=store) as house:
        client = await house.client(declares=Polls())
        handle = await created(client, "wait_tasks", **SESSION)
    left = store.get(handle.task_id)
    assert left is not None and (left.status, left.status_message) == ("failed", "The server is stopping")


# --- over HTTP, with two tokens


class Tokens:
    """Takes any token; it is the name of its client."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=[])


@asynccontextmanager
async def http_client(app: ASGIApp, token: str) -> AsyncIterator[Client]:
    guarded = AuthenticationMiddleware(AuthContextMiddleware(app), backend=BearerAuthBackend(Tokens()))
    transport = httpx2.ASGITransport(guarded)
    async with httpx2.AsyncClient(transport=transport, headers={"Authorization": f"Bearer {token}"}) as web:
        url = "http://127.0.0.1:8000/mcp"
        async with Client(streamable_http_client(url, http_client=web), extensions=[Polls()]) as client:
            yield client


async def test_a_handle_is_its_owners_alone() -> None:
    async with open_house() as house:
        local = await house.client(declares=Polls())
        app = house.server.streamable_http_app(json_response=True)
        async with house.server.session_manager.run(), http_client(app, "ann") as ann, http_client(app, "bob") as bob:
            handle = await created(ann, "wait_tasks", **SESSION)
            for method in ("tasks/get", "tasks/update", "tasks/cancel"):
                assert await Waits(bob.session).refusal(method, handle.task_id) == INVALID_PARAMS
            assert (await Waits(ann.session).get(handle.task_id))["status"] == "working"
            assert await Waits(local.session).refusal("tasks/get", handle.task_id) == INVALID_PARAMS
            house.backend.may_finish.set()
            assert (await Waits(ann.session).settled(handle.task_id))["status"] == "completed"


async def test_the_header_must_name_the_task_that_is_asked_for() -> None:
    async with open_house() as house:
        app = house.server.streamable_http_app(json_response=True)
        async with house.server.session_manager.run(), http_client(app, "ann") as ann:
            handle = await created(ann, "wait_tasks", **SESSION)
            request = Unnamed(method="tasks/get", params=TaskParams(task_id=handle.task_id))
            with pytest.raises(MCPError) as caught:
                await ann.session.send_request(request, Result)
            assert caught.value.error.code == HEADER_MISMATCH
