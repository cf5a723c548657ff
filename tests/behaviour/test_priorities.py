"""Priorities of tasks, as agents give and change them, and what replies say of the queue."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.backends.inference.batching import Limits, Prompt, PromptBatcher
from rhapsody_mcp.backends.inference.openai_client import Answer, Conversation
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, perform

pytestmark = pytest.mark.anyio

INT = {"function": "builtins:int"}


async def submit(agent: Agent, *tasks: dict[str, Any]) -> str:
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=list(tasks))
    return session


def received(backend: ScriptedBackend) -> list[tuple[str, int]]:
    return [(run.spec.uid, run.spec.priority) for run in backend.received]


async def test_tasks_reach_their_backend_by_priority() -> None:
    async with open_agent() as agent:
        each = {"name": "each", "args": [{"item": True}], "function": "builtins:abs", "for_each": [1, 2]}
        session = await submit(agent, INT, INT | {"priority": 5}, each | {"priority": 9}, INT | {"priority": -1})
        await agent.call("wait_tasks", session=session)
        assert received(agent.backend) == [
            ("task.000003[0]", 9),
            ("task.000003[1]", 9),
            ("task.000002", 5),
            ("task.000001", 0),
            ("task.000004", -1),
        ]


async def test_waiting_tasks_get_another_priority_and_the_position_in_the_queue_is_told() -> None:
    backend = ScriptedBackend(perform)
    backend.may_start.clear()
    async with open_agent(backend=backend) as agent:
        session = await submit(agent, *(INT | {"name": name} for name in "abcd"))
        reply = await agent.call("wait_tasks", session=session, timeout_s=0)
        assert reply["open"][3] == "d QUEUED behind 3 on scripted, 3 of them waiting"
        reply = await agent.call("submit_tasks", session=session, reprioritize={"d": 2})
        assert reply["submitted"] == 0 and reply["names"] == {"d": "task.000004"}
        assert "Priorities: d 2" in agent.texts[-1]
        reply = await agent.call("wait_tasks", session=session, timeout_s=0)
        assert reply["open"][0] == "a QUEUED behind 1 on scripted, 1 of them waiting"
        assert reply["open"][3] == "d QUEUED at scripted, which has not started it yet"
        large = {"name": "large", "executable": "ls", "cores": 4}
        await agent.call("submit_tasks", session=session, tasks=[large])
        reply = await agent.call("wait_tasks", session=session, timeout_s=0)
        assert reply["open"][4].endswith("behind 4 on scripted, 4 of them waiting; it needs 4 cores at once")
        backend.may_start.set()
        await agent.call("wait_tasks", session=session)
        text = await agent.refusal("submit_tasks", session=session, reprioritize={"d": 3})
        assert "d has ended DONE" in text
        await agent.refusal("submit_tasks", session=session, reprioritize={"e": 3})
        assert "an object of at least 1 name" in await agent.refusal("submit_tasks", session=session, reprioritize={})
        assert "-1000 to 1000" in await agent.refusal("submit_tasks", session=session, reprioritize={"d": 3000})
        assert "-1000 to 1000" in await agent.refusal("submit_tasks", session=session, tasks=[INT | {"priority": 3000}])


async def test_priorities_outlive_the_service(tmp_path: Path) -> None:
    life = partial(open_agent, ledger=tmp_path)
    waiting = ScriptedBackend(perform)
    waiting.may_start.clear()
    async with life(backend=waiting) as agent:
        each = {"name": "each", "args": [{"item": True}], "function": "builtins:abs", "for_each": [1, 2]}
        session = await submit(agent, INT | {"name": "a", "priority": 1}, INT | {"name": "b"}, each)
        await agent.call("submit_tasks", session=session, reprioritize={"b": 3, "each": 2})
    async with life() as agent:
        await agent.call("wait_tasks", session=session)
        assert [uid for uid, _ in received(agent.backend)] == [
            "task.000002",
            "task.000003[0]",
            "task.000003[1]",
            "task.000001",
        ]


async def test_an_exported_script_has_the_priorities(tmp_path: Path) -> None:
    async with open_agent() as agent:
        session = await submit(agent, INT | {"name": "a", "priority": 4})
        await agent.call("wait_tasks", session=session)
        reply = await agent.call("export_session", session=session, folder=str(tmp_path))
        assert "priority=4" in await asyncio.to_thread(Path(reply["script"]).read_text)


async def test_real_workers_and_programs_start_by_priority(tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"

    def note(what: str, until: Path | None = None) -> None:
        import time

        with open(log, "a") as file:
            file.write(what)
        while until is not None and not until.exists():
            time.sleep(0.01)

    runs = asyncio.Event()
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        session.on_change.add(lambda task: runs.set() if task.state is TaskState.RUNNING else None)
        first = ComputeTask(note, args=("0", go))
        await session.submit_tasks([first])
        await asyncio.wait_for(runs.wait(), 60)
        priorities = {"a": 0, "b": 1, "c": 0}
        later = [ComputeTask(note, args=(name,), priority=priority) for name, priority in priorities.items()]
        await session.submit_tasks(later)
        session.prioritize(later[2], 5)
        go.touch()
        await session.wait_tasks(later, timeout=60)
        assert log.read_text() == "0cba"


class Server:
    """Answers one request at a time, when it is told to."""

    models: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()

    async def complete(self, parameters: dict[str, Any], conversations: list[Conversation]) -> list[Answer]:
        self.asked += [str(conversation[0]["content"]) for conversation in conversations]
        await self.may_answer.wait()
        return [Answer((), None) for _ in conversations]


async def test_prompts_are_sent_by_priority() -> None:
    server: Any = Server()
    batcher = PromptBatcher([server], Limits(batch=1, at_once=1, wait_s=0.0))

    def prompt(text: str, priority: int = 0) -> Prompt:
        return Prompt([{"role": "user", "content": text}], {}, b"", lambda: None, priority)

    prompts = [prompt("a"), prompt("b"), prompt("c", 5), prompt("d")]
    batcher.ask(prompts[:1])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    batcher.ask(prompts[1:])
    batcher.prioritize([prompts[3]], 9)
    server.may_answer.set()
    await asyncio.wait([each.answer for each in prompts], timeout=10)
    assert server.asked == ["a", "d", "c", "b"]
    await batcher.close()
