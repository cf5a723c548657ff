"""Whatever a client sends, the server says in a sentence what is wrong with it, and goes on."""

from __future__ import annotations

import copy
import json
import math
import operator
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.streams.buffered import BufferedByteReceiveStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from mcp import Client
from mcp.types import CallToolResult, Tool

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.inference.prompt_runner import check_prompts
from rhapsody_mcp.backends.local import LocalExecutionBackend
from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.engine.transport import frame
from rhapsody_mcp.model.specs import Call, Completion, TaskSpec
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.runtime.requests.task_request import FIELDS
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import build_server
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend
from rhapsody_mcp.toolsets.replies.formatting import one_line
from tests.agents import Agent, text_of
from tests.services import own_service

CALLS = {"submit_tasks": 800}
"""How many calls each tool gets; the others get OTHER_CALLS."""
OTHER_CALLS = 150
KNOWN_TASKS: list[dict[str, Any]] = [
    {"name": "numbers", "source": "def numbers():\n    return 1"},
    {"name": "train", "executable": "/bin/echo", "arguments": [1]},
    {"name": "sweep", "function": "builtins:abs", "args": [{"item": True}], "for_each": [1, 2, 3]},
]
CARDS = {card.name: card for card in read_cards()}
QUICK = Settings(wait_cap_s=0.01, wait_default_s=0.01)

# --- the server that is asked


class CheckingBackend(ScriptedBackend):
    """Runs nothing, but refuses what the real backends refuse, and what cannot be sent to an engine breaks it."""

    def __init__(self) -> None:
        super().__init__(answer, name="local")
        self._compute = LocalExecutionBackend(2)

    def check(self, spec: TaskSpec) -> None:
        if isinstance(spec.work, Completion):
            check_prompts(spec)
        else:
            self._compute.check(spec)
        frame([spec])


def opened(session_config: SessionConfig) -> list[Backend]:
    """What is wished for is checked as the real server does it."""
    for plan in plan_backends(session_config, QUICK):
        plan.open()
    return [CheckingBackend()]


@asynccontextmanager
async def open_checked_agent() -> AsyncIterator[Agent]:
    async with SessionRegistry(opened) as sessions, TasksExtension() as tasks:
        async with Client(build_server(QUICK, sessions, [tasks])) as client:
            yield Agent(client, CheckingBackend(), sessions)


def answer(spec: TaskSpec, _: list[Any]) -> Any:
    checks = isinstance(spec.work, Call) and b"engine.task.import_check" in spec.work.code
    return [] if checks else [1, {"a": [2]}, "two"]


class Subject:
    """A server with one session of known tasks, as it stands before each call."""

    def __init__(self, portal: BlockingPortal, agent: Agent) -> None:
        self._portal, self._agent = portal, agent
        self.tools: dict[str, Tool] = {tool.name: tool for tool in portal.call(agent.client.list_tools).tools}
        portal.call(self._reset)

    def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """Its reply; the server has answered a good call since."""
        result: CallToolResult = self._portal.call(self._call, tool, arguments)
        return result

    async def _call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        result = await self._agent.client.call_tool(tool, arguments)
        await self._agent.call("list_sessions")
        if self._state() != self._known:
            await self._reset()
        return result

    async def _reset(self) -> None:
        await self._agent.sessions.close_all()
        await self._agent.call("create_session", name="session-1")
        await self._agent.call("submit_tasks", session="session-1", tasks=KNOWN_TASKS)
        while not (await self._agent.call("wait_tasks", session="session-1"))["ended"]:
            pass
        self._known = self._state()

    def _state(self) -> list[Any]:
        return [(opened, len(opened.session.tasks)) for opened in self._agent.sessions.all()]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, start_blocking_portal() as portal:
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_STATE_HOME", str(home))
        patch.chdir(home)
        with portal.wrap_async_context_manager(open_checked_agent()) as agent:
            yield Subject(portal, agent)


# --- what is sent

TEXTS = [
    *("session-1", "session-2", "numbers", "sweep", "sweep[1]", "sweep[99]", "task.000001", "trian", "all", "local"),
    *("", " ", "\0", "\x1b[2J", "\u202e", "\U0001f600", "null", "NaN", "[1", '["\\ud800"]', "{item}", "{{item}}"),
    *("/0/a", "/9", "/-1", "0/a", "~", "~nobody-here/x", "../x", "\0x", "/a\0", "/dev/null", "/dev/null/x", "/tmp"),
    *("def f():\n    return 1", "def f(:", "math:sqrt", "a:b:c", "FAILED", "http://[", "http://127.0.0.1:1/v1"),
    *("1.0000", "-1", "9" * 30, "\u0661", "\u00b2", "%s{}{0.x}", "</tool>", "ref", "literal", "item", "path", "name"),
]
HALVES = ["\ud800", "a\udfff"]
NUMBERS: list[float] = [-1, 0, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400]
NUMBERS += [0.5, -0.0, 1e-300, 1e308, math.inf, -math.inf, math.nan]
SCALARS = [None, True, False, *NUMBERS, *TEXTS, *HALVES]
NESTED = [
    *([], {}, [[]], [{}], {"a": {}}, ["numbers"], ["numbers", None], {"numbers": 1}, {"": ""}, [1, 2, 3], [True]),
    *({"ref": "numbers"}, {"ref": "numbers", "path": "/9"}, {"ref": "nobody"}, {"ref": 1}, {"ref": None, "path": 2}),
    *({"ref": "numbers", "x": 1}, {"ref": "sweep", "path": "/0/a"}, {"ref": "numbers", "path": "0"}, {"literal": 1}),
    *({"item": True}, {"item": True, "path": "/a"}, {"item": 1}, {"item": True, "path": 1}, [{"item": True}] * 2),
    *({"type": "object", "properties": 1}, {"type": "object", "minProperties": 10**400}),
    *({"A=B": "x"}, {"A": 1}, {"A": "\0"}, {"": "x"}),
    *([{"ranks": 1, "policy": {"gpu_affinity": [10**30]}}], [{"ranks": 1, "policy": {"gpu_affinity": [-1]}}]),
    *([{"ranks": 10**30}], [{"ranks": 1, "env": {"": "x"}}], [{"ranks": 1, "cwd": ""}], [{"rank": 1}]),
    *({"item": True, "path": ""}, ["{item}"], ["\ud800"], [10**30], [math.nan], {"a": [{"ref": "nobody"}]}),
]
KEYS = st.sampled_from(TEXTS) | st.text(max_size=12)


def nested(value: Any, wrap: Callable[[Any], Any], depth: int) -> Any:
    for _ in range(depth):
        value = wrap(value)
    return value


def filled(item: str, count: int) -> Any:
    return [json.loads(item) for _ in range(count)]


WRAPS = st.sampled_from([lambda v: [v], lambda v: {"a": v}, lambda v: {"literal": v}, lambda v: [{"ref": v}]])
DEEP = st.builds(nested, st.sampled_from(SCALARS), WRAPS, st.sampled_from([3, 60, 120]))
LONG_TEXTS = st.builds(operator.mul, st.sampled_from(["x", "é", "a/", "["]), st.sampled_from([400, 100_000]))
LONG = LONG_TEXTS | st.builds(filled, st.sampled_from(['["x"]', "{}", '{"x": 1}']), st.sampled_from([200, 2000]))
ODD = st.sampled_from(SCALARS)
REFERENCES: SearchStrategy[Any] = (
    st.builds(dict, ref=ODD) | st.builds(dict, ref=KEYS, path=ODD) | st.builds(dict, item=ODD)
)
ANYTHING = (
    st.recursive(
        ODD | st.integers() | KEYS | REFERENCES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=6,
    )
    | DEEP
    | LONG
)


def fitting(schema: dict[str, Any]) -> SearchStrategy[Any]:
    """What the schema lets through, and what is just beside it."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([fitting(choice) for choice in schema["anyOf"]])
    match schema.get("type"):
        case "string":
            return KEYS
        case "boolean":
            return st.booleans()
        case "integer" | "number":
            edges = [schema[edge] for edge in ("minimum", "maximum", "exclusiveMinimum") if edge in schema]
            near = [edge + step for edge in edges or [0] for step in (-1, 0, 1, 0.5)]
            return st.sampled_from([*NUMBERS, *near])
        case "array":
            return st.lists(fitting(schema.get("items", {})), max_size=3)
        case "object":
            return an_object(schema) if "properties" in schema else st.dictionaries(KEYS, ANYTHING, max_size=3)
    return ANYTHING


GOOD = {
    "source": "def f(x=0):\n    return x",
    "function": "builtins:abs",
    "executable": "/bin/echo",
    "prompt": "Write {item}.",
    "session": "session-1",
    "task": "numbers",
}


def one_odd_value(tool: Tool) -> Iterator[dict[str, Any]]:
    """Calls of which all is right but one argument, or one field of a task."""
    good: dict[str, Any] = {name: GOOD[name] for name in tool.input_schema.get("required", ()) if name in GOOD}
    if "tasks" in tool.input_schema.get("required", ()):
        good["tasks"] = [{"executable": "/bin/echo"}]
    for name in tool.input_schema["properties"]:
        yield from ({**good, name: value} for value in copy.deepcopy(SCALARS + NESTED))
    if tool.name == "submit_tasks":
        places = [(kind, field) for kind in ("source", "executable", "prompt") for field in sorted(FIELDS[kind])]
        for kind, field in [*places, ("function", "function")]:
            for value in copy.deepcopy(SCALARS + NESTED):
                yield good | {"tasks": [{kind: GOOD[kind], field: value}]}


@st.composite
def an_object(draw: DrawFn, schema: dict[str, Any]) -> dict[str, Any]:
    """With what it must have, and with some of what it may."""
    optional = draw(st.lists(st.sampled_from(sorted(schema["properties"])), max_size=4))
    return {name: draw(fitting(schema["properties"][name])) for name in [*schema.get("required", ()), *optional]}


@st.composite
def malformed(draw: DrawFn, tool: Tool, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A call as an example or the schema has it, with up to four things done to it at any depth."""
    known = dict(fields_in(tool.input_schema))
    start = an_object(tool.input_schema) if tool.input_schema["properties"] else st.just({})
    if examples:
        start |= st.sampled_from(examples)
    arguments: dict[str, Any] = copy.deepcopy(draw(start))
    for _ in range(draw(st.integers(0, 4))):
        inside = draw(st.sampled_from(list(containers(arguments))))
        if isinstance(inside, list):
            spoil_list(draw, inside)
        else:
            spoil_object(draw, inside, known)
    if "session" in known and draw(st.integers(0, 3)):
        arguments["session"] = "session-1"  # so that what comes behind it is met
    return arguments


def spoil_list(draw: DrawFn, items: list[Any]) -> None:
    match draw(st.sampled_from(["replace", "add", "twice", "empty"])):
        case "replace" if items:
            items[draw(st.integers(0, len(items) - 1))] = draw(ANYTHING)
        case "twice":
            items += copy.deepcopy(items[:5])
        case "empty":
            items.clear()
        case _:
            items.append(draw(ANYTHING))


def spoil_object(draw: DrawFn, fields: dict[Any, Any], known: dict[str, dict[str, Any]]) -> None:
    """`known` are the schemas of all fields of the tool, by name."""
    name = draw(st.sampled_from([*fields, *known] or ["session"]))
    match draw(st.sampled_from(["fit", "fit", "set", "set", "misspell", "leave out", "as JSON"])):
        case "fit":
            fields[name] = draw(fitting(known.get(name, {})))
        case "misspell":
            fields[draw(st.sampled_from([name[:-1], name + "s", name.upper(), "", "x" * 5000]) | KEYS)] = 1
        case "leave out":
            fields.pop(name, None)
        case "as JSON":
            fields[name] = json.dumps(draw(ANYTHING))
        case _:
            fields[name] = draw(ANYTHING)


def containers(value: Any) -> Iterator[Any]:
    """It, and every list and object in it that is not too deep."""
    pending = [(value, 0)]
    while pending:
        found, depth = pending.pop()
        if isinstance(found, list | dict) and depth < 8:
            yield found
            inside = list(found.values() if isinstance(found, dict) else found)[:8]
            pending += [(part, depth + 1) for part in inside]


def fields_in(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield name, field
        yield from fields_in(field)
        yield from fields_in(field.get("items", {}))


def confined(arguments: dict[str, Any]) -> dict[str, Any]:
    """What is written is written below the folder in which the test runs."""
    folder = arguments.get("folder")
    if isinstance(folder, str) and folder.startswith("/"):
        return arguments | {"folder": "~" + folder.replace("..", "")}
    return arguments


# --- what comes back

NEXT = re.compile(r"(Correct it and call [a-z_ ]+ again|[Cc]all again with force=true|Call [a-z_]+ [^.]+)\.$")
LEAKS = ("Traceback", "pydantic", "Error executing", "internal_error", "Input should", "Value error", "Errno", " at 0x")


def assert_reply(result: CallToolResult) -> None:
    result.model_dump_json()  # so it goes over the wire
    if not result.is_error:
        assert result.structured_content is not None
        return
    text = text_of(result)
    assert len(text.encode()) <= 1000
    assert re.match(r"[a-z_]+: \S", text), text
    assert NEXT.search(text), text
    assert one_line(text) == text, text
    assert not [leak for leak in LEAKS if leak in text], text


@pytest.mark.parametrize("tool", sorted(CARDS))
def test_every_argument_with_every_odd_value_gets_a_reply_or_a_sentence(tool: str, subject: Subject) -> None:
    for arguments in one_odd_value(subject.tools[tool]):
        assert_reply(subject.call(tool, confined(arguments)))


@pytest.mark.parametrize("tool", sorted(CARDS))
def test_any_arguments_of_any_tool_get_a_reply_or_a_sentence(tool: str, subject: Subject) -> None:
    examples = [dict(example.arguments) for example in CARDS[tool].examples]

    @settings(
        max_examples=CALLS.get(tool, OTHER_CALLS),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(malformed(subject.tools[tool], examples).map(confined))
    def holds(arguments: dict[str, Any]) -> None:
        assert_reply(subject.call(tool, arguments))

    holds()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("wait_tasks", {"tasks": 7}, 'tasks must be a list, as in ["train", "task.000007"], not 7.'),
        ("wait_tasks", {"tasks": ["a", 1]}, "tasks[1] must be a text, not 1."),
        ("wait_tasks", {"state": "dune"}, "not 'dune' (did you mean 'DONE'?)."),
        ("wait_tasks", {"timeout_s": "soon"}, "timeout_s must be a number of at least 0, not 'soon'."),
        ("wait_tasks", {"count": None, "timeout_s": -1}, "timeout_s must be at least 0, not -1."),
        ("wait_tasks", {"count": 1.5}, "count must be a whole number of at least 1, not 1.5."),
        ("list_tasks", {"limit": {"a": True}}, 'limit must be a whole number from 1 to 50, not {"a": true}.'),
        ("list_tasks", {"limit": 51}, "limit must be at most 50, not 51."),
        ("cancel_tasks", {"all_open": "maybe"}, "all_open must be true or false, not 'maybe'."),
        ("cancel_tasks", {"tasks": []}, "tasks must be a list of at least 1 item, not []."),
        ("get_result", {"task": "a", "search": "|"}, "search must be a text that says what to look for"),
        ("get_result", {"task": "a", "search": "x" * 201}, "search must be a text of at most 200 characters, not 'xxx"),
        ("get_result", {"task": None}, "task is missing."),
        ("get_result", {}, "task is missing."),
        ("submit_tasks", {"tasks": [7]}, "tasks[0] must be an object, not 7."),
        ("submit_tasks", {"tasks": [{"prompt": 5}]}, "tasks[0].prompt must be a text, a list or an object, not 5."),
        (
            "submit_tasks",
            {"tasks": [{"name": "x", "for_each": True}]},
            "[0] ('x').for_each must be a list, an object or a whole number",
        ),
        (
            "submit_tasks",
            {"tasks": [{"kwargs": []}]},
            'kwargs must be an object, as in {"steps": 100}, not [].',
        ),
        (
            "submit_tasks",
            {"tasks": [], "idempotency_key": ""},
            "must be a text of at least 1 character, not ''.",
        ),
        (
            "submit_tasks",
            {"tasks": [{"process_templates": [{"rank": 1}]}]},
            "no field 'rank' (did you mean 'ranks'?)",
        ),
        ("submit_tasks", {"tasks": [{"prompt": "\ud800"}]}, "tasks[0].prompt holds half a character"),
        ("submit_tasks", {"tasks": [{"args": [nested(1, lambda v: [v], 120)]}]}, "tasks[0].args is too deep."),
        ("submit_tasks", {"tasks": [{"function": "a:b", "kwargs": {"ref": "a"}}]}, "unknown task 'a'"),
        (
            "submit_tasks",
            {"tasks": [{"function": "a:b", "kwargs": {"literal": 1}}]},
            "kwargs is an object with",
        ),
        (
            "submit_tasks",
            {"tasks": [{"prompt": "x", "max_tokens": 10**30}]},
            "a whole number from 1 to 2147483647",
        ),
    ],
)
async def test_a_refusal_says_what_is_valid(tool: str, arguments: dict[str, Any], told: str) -> None:
    async with open_checked_agent() as agent:
        session = await agent.session()
        text = await agent.refusal(tool, session=session, **arguments)
    assert told in text
    assert text.endswith(f" Correct it and call {tool} again.")


@pytest.mark.anyio
async def test_lists_may_come_as_texts_of_json_and_texts_stay_texts() -> None:
    async with open_checked_agent() as agent:
        session = await agent.session()
        tasks = json.dumps([{"name": "null", "executable": "/bin/echo"}])
        await agent.call("submit_tasks", session=session, tasks=tasks)
        assert (await agent.call("list_tasks", session=session, name_contains="null"))["total"] == 1
        assert (await agent.call("list_tasks", session=session, name_contains="[1]"))["total"] == 0


# --- over the wire

META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
WIDE = 10_000_000


def request(method: object, id: object = "bad", **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": {**params, "_meta": META}}).encode()


def list_sessions(**arguments: Any) -> bytes:
    return request("tools/call", name="list_sessions", arguments=arguments)


MESSAGES = {
    "no JSON": b"GET / HTTP/1.1",
    "no UTF-8": b'{"jsonrpc": "2.0", "id": "bad", "method": "\xff\xfe"}',
    "half an object": b'{"jsonrpc": "2.0", "id": "bad",',
    "another thing": b'[1, null, "text"]',
    "another version": b'{"jsonrpc": "1.0", "id": "bad", "method": "tools/list"}',
    "no method": b'{"jsonrpc": "2.0", "id": "bad"}',
    "a response to nothing": b'{"jsonrpc": "2.0", "id": "bad", "result": {}}',
    "an unknown method": request("tools/eat"),
    "a method that is a number": request(7),
    "an id that is an object": request("tools/list", id={"a": 1}),
    "no params": b'{"jsonrpc": "2.0", "id": "bad", "method": "tools/call"}',
    "params that are a list": b'{"jsonrpc": "2.0", "id": "bad", "method": "tools/call", "params": [1]}',
    "no name": request("tools/call", arguments={}),
    "a name that is a list": request("tools/call", name=["list_sessions"]),
    "arguments that are a text": request("tools/call", name="list_sessions", arguments="{}"),
    "an unknown tool": request("tools/call", name="list_session", arguments={}),
    "a number that is none": list_sessions(x=math.nan),
    "half a character": list_sessions(x="\ud800"),
    "a value too deep": list_sessions(x=nested(1, lambda v: [v], 900)),
    "a number too long": list_sessions().replace(b'"arguments": {}', b'"arguments": {"x": 1%s}' % (b"0" * 5000)),
    "a long argument": list_sessions(x="x" * WIDE),
    "a long name": list_sessions(**{"x" * WIDE: 1}),
    "a long line": b"x" * WIDE,
}

UNANSWERED = ("a response to nothing", "an id that is an object")
"""Nothing that could be answered: the second passes for a notification."""
UNREADABLE = ("half an object", "half a character", "a value too deep", "a number too long")
"""No JSON, and yet their sender's id can be seen."""


@pytest.mark.anyio
async def test_the_server_answers_every_malformed_message_and_goes_on() -> None:
    with anyio.fail_after(600), own_service() as service:
        command = service.command("stdio")
        async with await anyio.open_process(command, stderr=None) as server:
            assert server.stdin and server.stdout
            replies = BufferedByteReceiveStream(server.stdout)
            for what, message in MESSAGES.items():
                await server.stdin.send(message + b"\n" + request("tools/call", id=what, name="list_sessions") + b"\n")
                told = [reply async for reply in until(what, replies)]
                assert len(told) == (what not in UNANSWERED), (what, told)
                assert all(is_refusal(reply) for reply in told), (what, told)
                assert what not in UNREADABLE or told[0]["id"] == "bad", (what, told)


async def until(id: str, replies: BufferedByteReceiveStream) -> AsyncIterator[dict[str, Any]]:
    """What comes before the good reply with this id."""
    while (reply := json.loads(await replies.receive_until(b"\n", 1_000_000))).get("id") != id:
        yield reply
    assert reply["result"]["structuredContent"] == {"sessions": []}


def is_refusal(reply: dict[str, Any]) -> bool:
    if "error" in reply:
        return isinstance(reply["error"]["message"], str) and "Traceback" not in str(reply)
    return bool(reply["result"]["isError"]) and bool(NEXT.search(reply["result"]["content"][0]["text"]))
