"""What would lose work or exceed a budget asks the person first, or demands force where nobody can be asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import pytest
from mcp.client import ClientRequestContext
from mcp.types import ElicitRequestParams, ElicitResult

from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.request_batch import make_tasks
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.tasks import Task
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.submission import prepared
from tests.agents import ERAS, Agent, open_agent

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("era", ERAS)]

SESSION = {"session": "session-1"}
YES = ElicitResult(action="accept", content={})
NOES = [
    pytest.param(ElicitResult(action="decline"), "said no", id="decline"),
    pytest.param(ElicitResult(action="cancel"), "gave no answer", id="cancel"),
    pytest.param(ElicitResult(action="accept", content={"go_on": False}), "said no", id="accept with no"),
]

CALLS_OF_A_QUESTION = {"legacy": 1, "auto": 2}
"""From protocol 2026-07-28 on, the answer comes with a second call."""


class Person:
    """Hears the questions of a client, and answers all of them alike, after having done something else."""

    def __init__(self, answer: ElicitResult) -> None:
        self.answer = answer
        self.heard: list[str] = []
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def __call__(self, _: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        self.heard.append(params.message)
        if self.meanwhile is not None:
            done, self.meanwhile = self.meanwhile, None
            await done()
        return self.answer


async def hold(agent: Agent, count: int) -> None:
    """A session with so many tasks that run until the gate opens."""
    await agent.session()
    agent.backend.may_finish.clear()
    await agent.call(
        "submit_tasks", **SESSION, tasks=[{"name": f"t{number}", "prompt": "x"} for number in range(count)]
    )


async def counts(agent: Agent) -> dict[str, int]:
    return dict((await agent.call("list_sessions"))["sessions"][0]["counts"])


LOSSES = [
    pytest.param("close_session", SESSION, "closes session-1, cancels 12 tasks", id="close"),
    pytest.param("cancel_tasks", {**SESSION, "all_open": True}, "cancels 12 tasks of session-1", id="cancel"),
]


@pytest.mark.parametrize(("tool", "arguments", "told"), LOSSES)
async def test_one_who_says_yes_is_asked_once_what_would_be_lost(
    era: str, tool: str, arguments: dict[str, Any], told: str
) -> None:
    person = Person(YES)
    async with open_agent(era, elicitation_callback=person) as agent:
        await hold(agent, 12)
        assert (await agent.call(tool, **arguments))["canceled"] == 12
    (question,) = person.heard
    assert told in question and "(t0, t1, t2 and 9 more)" in question and question.endswith("Go on?")


@pytest.mark.parametrize(("answer", "said"), NOES)
@pytest.mark.parametrize(("tool", "arguments", "told"), LOSSES)
async def test_one_who_does_not_agree_changes_nothing(
    era: str, tool: str, arguments: dict[str, Any], told: str, answer: ElicitResult, said: str
) -> None:
    async with open_agent(era, elicitation_callback=Person(answer)) as agent:
        await hold(agent, 12)
        refused = await agent.refusal(tool, **arguments)
        assert refused.startswith(f"not_confirmed: the person was asked and {said}; nothing was changed.")
        assert await counts(agent) == {"RUNNING": 12}


@pytest.mark.parametrize(("tool", "arguments", "told"), LOSSES)
async def test_a_client_that_cannot_ask_needs_force(era: str, tool: str, arguments: dict[str, Any], told: str) -> None:
    async with open_agent(era) as agent:
        await hold(agent, 12)
        refused = await agent.refusal(tool, **arguments)
        assert refused.startswith("needs_force: ") and told in refused
        assert refused.endswith("call again with force=true.")
        assert await counts(agent) == {"RUNNING": 12}
        assert (await agent.call(tool, **arguments, force=True))["canceled"] == 12


@pytest.mark.parametrize(("tool", "arguments", "told"), LOSSES)
async def test_force_does_not_ask(era: str, tool: str, arguments: dict[str, Any], told: str) -> None:
    person = Person(YES)
    async with open_agent(era, elicitation_callback=person) as agent:
        await hold(agent, 12)
        assert (await agent.call(tool, **arguments, force=True))["canceled"] == 12
    assert not person.heard


async def test_nobody_is_asked_where_little_is_lost(era: str) -> None:
    async with open_agent(era) as agent:
        await hold(agent, 10)
        assert (await agent.call("cancel_tasks", **SESSION, all_open=True))["canceled"] == 10
        assert (await agent.call("close_session", **SESSION))["canceled"] == 0


async def test_tasks_that_need_a_canceled_one_count_as_canceled(era: str) -> None:
    async with open_agent(era) as agent:
        await hold(agent, 1)
        echo = "def echo(x):\n    return x"
        uses = [{"name": f"u{number}", "source": echo, "args": [{"ref": "t0"}]} for number in range(10)]
        await agent.call("submit_tasks", **SESSION, tasks=uses)
        assert "cancels 11 tasks" in await agent.refusal("cancel_tasks", **SESSION, tasks=["t0"])
        assert (await agent.call("cancel_tasks", **SESSION, tasks=["u0"]))["canceled"] == 1


async def test_tasks_that_end_while_a_person_reads_bring_no_second_question(era: str) -> None:
    person = Person(YES)
    async with open_agent(era, elicitation_callback=person) as agent:
        await hold(agent, 12)
        person.meanwhile = lambda: agent.call("cancel_tasks", **SESSION, tasks=["t0", "t1"])
        with anyio.fail_after(600):
            assert (await agent.call("close_session", **SESSION))["canceled"] == 10
    assert len(person.heard) == 1


async def test_a_no_holds_where_all_has_ended_while_the_person_read(era: str) -> None:
    person = Person(ElicitResult(action="decline"))
    async with open_agent(era, elicitation_callback=person) as agent:
        await hold(agent, 2)
        person.meanwhile = lambda: agent.call("cancel_tasks", **SESSION, all_open=True)
        assert (await agent.refusal("close_session", **SESSION)).startswith("not_confirmed: ")
        assert await counts(agent) == {"CANCELED": 2}


async def test_an_answer_that_cannot_be_read_is_none(era: str) -> None:
    person = Person(ElicitResult(action="accept", content={"go_on": "perhaps"}))
    async with open_agent(era, elicitation_callback=person) as agent:
        await hold(agent, 1)
        assert (await agent.refusal("close_session", **SESSION)).startswith("invalid_answer: ")
        assert await counts(agent) == {"RUNNING": 1}


async def test_what_is_wrong_is_refused_without_a_question(era: str) -> None:
    person = Person(YES)
    async with open_agent(era, elicitation_callback=person) as agent:
        assert (await agent.refusal("close_session", session="other")).startswith("unknown_session: ")
        assert "has no argument 'answer'" in await agent.refusal("close_session", **SESSION, answer={"go_on": True})
        await agent.session()
        assert (await agent.refusal("cancel_tasks", **SESSION)).startswith("invalid_request: ")
        assert (await agent.refusal("cancel_tasks", **SESSION, tasks=["other"])).startswith("unknown_task: ")
    assert not person.heard


OVER = [
    pytest.param(
        Settings(budget_tasks=2),
        [{"prompt": "x"}, {"prompt": "y"}],
        "gives session-1 3 tasks, and its budget is 2 (budget_tasks in the server's settings).",
        id="tasks",
    ),
    pytest.param(
        Settings(budget_tokens=1000),
        [{"prompt": ["x", "y"], "max_tokens": 600}],
        "gives session-1 1,200 tokens of answers, and its budget is 1,000 (budget_tokens in the server's settings).",
        id="tokens",
    ),
    pytest.param(
        Settings(budget_tasks=3, budget_tokens=200),
        [{"prompt": "{item}", "max_tokens": 100, "for_each": ["a", "b", "c"]}],
        "gives session-1 4 tasks, and its budget is 3 (budget_tasks in the server's settings); 300 tokens of answers, "
        "and its budget is 200 (budget_tokens in the server's settings).",
        id="for each",
    ),
    pytest.param(
        Settings(budget_tokens=200),
        [
            {"prompt": "x", "max_tokens": {"item": True}, "n": 2, "for_each": [10, 20]},
            {"prompt": ["x", "y"], "max_tokens": 30, "n": 3},
        ],
        "gives session-1 240 tokens of answers, and its budget is 200 (budget_tokens in the server's settings).",
        id="several answers",
    ),
]


async def submitted(agent: Agent) -> int:
    return sum((await counts(agent)).values())


@pytest.mark.parametrize(("settings", "tasks", "told"), OVER)
async def test_a_submission_over_budget_asks(
    era: str, settings: Settings, tasks: list[dict[str, Any]], told: str
) -> None:
    person = Person(ElicitResult(action="decline"))
    async with open_agent(era, settings=settings, elicitation_callback=person) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "first"}])
        assert not person.heard
        assert (await agent.refusal("submit_tasks", **SESSION, tasks=tasks)).startswith("not_confirmed: ")
        assert person.heard == [f"This {told} Go on?"] and await submitted(agent) == 1
        person.answer = YES
        await agent.call("submit_tasks", **SESSION, tasks=tasks)
        assert await submitted(agent) > 1 and len(person.heard) == 2


@pytest.mark.parametrize(("settings", "tasks", "told"), OVER)
async def test_a_submission_over_budget_needs_force_where_nobody_can_be_asked(
    era: str, settings: Settings, tasks: list[dict[str, Any]], told: str
) -> None:
    async with open_agent(era, settings=settings) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "first"}])
        refused = await agent.refusal("submit_tasks", **SESSION, tasks=tasks)
        assert refused.startswith(f"needs_force: This {told}") and await submitted(agent) == 1
        await agent.call("submit_tasks", **SESSION, tasks=tasks, force=True)
        assert await submitted(agent) > 1


async def test_a_submission_over_budget_makes_its_tasks_once_a_call(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(requests: Sequence[TaskRequest], session: OpenSession) -> list[Task]:
        made.append(len(requests))
        return make_tasks(requests, session)

    monkeypatch.setattr(prepared, "make_tasks", counted)
    person = Person(YES)
    async with open_agent(era, settings=Settings(budget_tasks=1), elicitation_callback=person) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "x"}, {"prompt": "y"}])
        assert await submitted(agent) == 2
    assert made == [2] * CALLS_OF_A_QUESTION[era] and len(person.heard) == 1


async def test_tasks_that_others_overtook_while_the_person_read_are_made_again(era: str) -> None:
    person = Person(YES)
    async with open_agent(era, settings=Settings(budget_tasks=1), elicitation_callback=person) as agent:
        await agent.session()
        person.meanwhile = lambda: agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "z"}], force=True)
        reply = await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "x"}, {"prompt": "y"}])
        assert (reply["first"], reply["last"]) == ("task.000002", "task.000003")
        assert await submitted(agent) == 3


async def test_a_dry_run_never_asks(era: str) -> None:
    async with open_agent(era, settings=Settings(budget_tasks=0)) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "x"}], dry_run=True)


async def test_no_budget_asks_nothing(era: str) -> None:
    async with open_agent(era, settings=Settings(budget_tasks=None)) as agent:
        await agent.session()
        await agent.call("submit_tasks", **SESSION, tasks=[{"prompt": "x"}] * 5)
        assert await submitted(agent) == 5
