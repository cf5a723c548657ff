"""A scripted agent: an MCP client in memory, before the real server on a scripted backend."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, cast

import msgspec
from mcp import Client
from mcp.types import CallToolResult, TextContent

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.sampling import SAMPLING
from rhapsody_mcp.model.specs import Call, Command, Completion, TaskSpec, parts_of
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import Ref
from rhapsody_mcp.protocol.task_store import LedgerHandleStore
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.recovery.recorder import Storage
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from tests.services import CLIENT

ERAS = ["legacy", "auto"]
"""The handshake revisions of the protocol, and 2026-07-28."""


class Refused(Exception):
    """A tool call ended in an error; the text is what the model reads."""


class Caller:
    """Calls tools as a model does. `calls` counts them, those without a reply too; `texts` holds what a model would
    have read."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.calls = 0
        self.replies: list[CallToolResult] = []

    @property
    def texts(self) -> list[str]:
        return [text_of(result) for result in self.replies]

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The structured reply. Raises Refused."""
        self.calls += 1
        result = await self.client.call_tool(tool, arguments)
        self.replies.append(result)
        if result.is_error:
            raise Refused(self.texts[-1])
        return cast(dict[str, Any], result.structured_content)

    async def refusal(self, tool: str, **arguments: Any) -> str:
        """The text of a call that must be refused; the rules that hold for each of them are checked here."""
        try:
            reply = await self.call(tool, **arguments)
        except Refused as refused:
            text = str(refused)
            assert text.partition(":")[0].replace("_", "").isalpha(), text
            assert len(text.encode()) <= 1000
            assert "Traceback" not in text and "Error executing" not in text and "pydantic" not in text
            return text
        raise AssertionError(f"{tool} was not refused: {reply}")


class Agent(Caller):
    """Before sessions of this process, which run on `backend`."""

    def __init__(self, client: Client, backend: ScriptedBackend, sessions: SessionRegistry) -> None:
        super().__init__(client)
        self.backend, self.sessions = backend, sessions

    async def session(self) -> str:
        return str((await self.call("create_session"))["session"])


@asynccontextmanager
async def open_agent(
    era: str = "auto",
    backend: ScriptedBackend | None = None,
    settings: Settings | None = None,
    ledger: Path | None = None,
    **options: Any,
) -> AsyncIterator[Agent]:
    """An agent before a server whose sessions run on `backend`, which does what tasks say unless it is scripted.

    `ledger` is the folder of one, which is read first. `options` are the client's.
    """
    scripted = backend or ScriptedBackend(perform)

    def open_backends(_: object) -> Sequence[Backend]:
        return [scripted]

    async with AsyncExitStack() as stack:
        storage, store = None, None
        if ledger is not None:
            opened = await stack.enter_async_context(open_ledger(ledger))
            storage, store = Storage(opened, ledger), LedgerHandleStore(opened)
            await store.load()
        sessions = await stack.enter_async_context(SessionRegistry(open_backends, storage, settings=settings))
        await sessions.restore()
        tasks = await stack.enter_async_context(TasksExtension(store))
        server = build_server(settings or Settings(), sessions, [tasks])
        client = await stack.enter_async_context(
            Client(server, mode=cast(Any, era), **{"client_info": CLIENT, **options})
        )
        yield Agent(client, scripted, sessions)


@asynccontextmanager
async def open_ledger(folder: Path) -> AsyncIterator[Ledger]:
    opened = Ledger(folder)
    await asyncio.to_thread(opened.open)
    try:
        yield opened
    finally:
        await opened.close()


def outcome_of(**fields: Any) -> ScriptedBackend:
    """A backend whose every task ends like this."""
    now = time.time()
    ended = Outcome(**{"state": TaskState.DONE, "started": now, "ended": now, **fields})
    return ScriptedBackend(lambda spec, values: ended)


def text_of(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


def perform(spec: TaskSpec, values: list[Any]) -> Any:
    """Does what a task says, in this process; a prompt is answered with its own text."""
    work = spec.work
    if isinstance(work, Call):
        args, kwargs = _arguments(work, values)
        return _function(work)(*args, **kwargs)
    if isinstance(work, Command):
        arguments = [parts_of(argument) for argument in work.arguments]
        bound = _bound(refs_of([*chain.from_iterable(arguments)]), values)
        joined = ("".join(_text(bound.get(part, part)) for part in parts) for parts in arguments)
        return " ".join([work.executable, *joined])
    return _answers(work, values)


def _answers(work: Completion, values: list[Any]) -> Any:
    """To each prompt, or to the last message."""
    messages = [message if isinstance(message, Ref) else message.content for message in work.messages]
    asked = [parts_of(content) for content in work.prompts or messages[-1:]]
    told = [parts_of(content) for content in (work.system_prompt or "", *messages)]
    stand_ins = [getattr(work, field) for field in SAMPLING]
    bound = _bound(refs_of([*chain.from_iterable([*asked, *told]), *stand_ins]), values)
    prompts = ["".join(_text(bound.get(part, part)) for part in parts) for parts in asked]
    return [f"answer to {prompt}" for prompt in prompts] if work.many else f"answer to {prompts[0]}"


def _function(work: Call) -> Callable[..., Any]:
    if work.form == "module":
        module, _, name = work.code.decode().partition(":")
        return cast(Callable[..., Any], getattr(import_module(module), name))
    space: dict[str, Any] = {}
    exec(work.code.decode(), space)
    return cast(Callable[..., Any], space[work.entry])


def _arguments(work: Call, values: list[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    if not work.arguments:
        return (), {}
    found: list[Ref] = []
    _Unpickler(work.arguments, lambda ref: found.append(ref)).load()
    return cast(
        tuple[Sequence[Any], dict[str, Any]], _Unpickler(work.arguments, _bound(found, values).__getitem__).load()
    )


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, meaning: Callable[[Ref], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._meaning = meaning

    def persistent_load(self, pid: Any) -> Any:
        return self._meaning(Ref(*pid))


def refs_of(items: list[Any]) -> list[Ref]:
    return [item for item in items if isinstance(item, Ref)]


def _bound(refs: list[Ref], values: list[Any]) -> dict[Any, Any]:
    """What each Ref stands for; a scripted backend gives the values in the order of their uids."""
    by_uid = dict(zip(sorted({ref.uid for ref in refs}), values, strict=True))
    return {ref: None if by_uid[ref.uid] is None else resolve_pointer(by_uid[ref.uid], ref.path) for ref in refs}


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def wire(value: Any) -> str:
    """What goes over the wire, in a form that a person can read and compare."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
