"""Spans and metrics of what agents submit, and log lines with their ids."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from rhapsody_mcp.model.outcome import Outcome, RankOutcome, Usage
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.telemetry.telemetry import configured_telemetry
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent, outcome_of
from tests.spans import Spans, kept_metrics, kept_spans

pytestmark = pytest.mark.anyio

EXECUTED: dict[str, Any] = {"submission": {}, "queue": {}, "execution": {}}


@pytest.fixture
def spans() -> Iterator[Spans]:
    with kept_spans() as spans:
        yield spans


def echo(name: str, *arguments: str, **more: object) -> dict[str, object]:
    return {"name": name, "executable": "echo", "arguments": list(arguments), **more}


def sweep(count: int, **more: object) -> dict[str, object]:
    return {"name": "sweep", "for_each": list(range(count)), "executable": "echo", "arguments": ["{item}"], **more}


async def run(agent: Agent, *tasks: dict[str, object]) -> str:
    session = await agent.session()
    await agent.call("submit_tasks", session=session, tasks=list(tasks))
    await agent.call("wait_tasks", session=session, timeout_s=60)
    return session


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# --- spans


async def test_a_trace_leads_from_the_chat_to_the_execution_of_each_task_of_a_pipeline(spans: Spans) -> None:
    async with open_agent() as agent:
        with spans.tracer.start_as_current_span("chat"):
            await run(agent, echo("first", "a"), echo("second", "{ref:first}"), sweep(2))
    assert spans.tree(spans.named("chat"))["tools/call submit_tasks"] == {
        "task first": EXECUTED,
        "task second": EXECUTED,
        "task sweep": {"task sweep[0]": EXECUTED, "task sweep[1]": EXECUTED, **EXECUTED},
    }


async def test_the_trace_of_a_client_elsewhere_comes_with_its_call(spans: Spans) -> None:
    async with open_agent() as agent:
        session = await agent.session()
        meta: Any = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        arguments = {"session": session, "tasks": [echo("first")]}
        await agent.client.call_tool("submit_tasks", arguments, meta=meta)
        await agent.call("wait_tasks", session=session)
    call, task = spans.named("tools/call submit_tasks"), spans.named("task first")
    assert call.parent is not None and task.parent is not None
    assert (call.parent.span_id, task.parent.span_id) == (0xB7AD6B7169203331, spans.id_of(call))
    assert task.parent.trace_id == 0x0AF7651916CD43DD8448EB211C80319C


async def test_the_spans_of_a_task_have_its_times_and_tell_what_it_was(spans: Spans) -> None:
    async with open_agent() as agent:
        await run(agent, echo("first"), echo("second", after=["first"]))
        ended = agent.sessions.get("session-1").task("second")
    task = spans.named("task second")
    submission, queue, execution = spans.below(task)
    assert ended.outcome is not None and ended.submitted is not None and ended.outcome.started is not None
    nanoseconds = [int(at * 1e9) for at in (ended.submitted, ended.outcome.started, ended.outcome.ended)]
    assert [task.start_time, execution.start_time, execution.end_time] == nanoseconds
    assert task.end_time == execution.end_time
    assert (submission.start_time, submission.end_time) == (task.start_time, queue.start_time)
    assert queue.end_time == execution.start_time
    assert [event.name for event in queue.events] == ["inputs are there"]
    assert attributes_of(task) == {
        "rhapsody.session.id": "session-1",
        "rhapsody.task.id": "task.000002",
        "rhapsody.task.name": "second",
        "rhapsody.task.kind": "executable",
        "rhapsody.backend.name": "scripted",
        "rhapsody.task.state": "DONE",
        "rhapsody.task.attempts": 1,
    }
    assert task.status.status_code is StatusCode.UNSET


async def test_a_failed_task_is_an_error_and_each_of_its_attempts_has_an_execution(spans: Spans) -> None:
    def script(spec: object, values: object) -> object:
        raise ValueError("it is broken\nin many lines, with api_key=abcdefgh12345678")

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        await run(agent, echo("first", retries=1, retry_delay_s=0), echo("second", "{ref:first}"))
    task = spans.named("task first")
    assert [span.name for span in spans.below(task)] == ["submission", *["queue", "execution"] * 2]
    assert task.status.status_code is StatusCode.ERROR
    assert task.status.description == "ValueError: it is broken"
    assert attributes_of(task)["error.type"] == attributes_of(task)["rhapsody.task.cause"] == "error"
    executions = [span for span in spans.below(task) if span.name == "execution"]
    assert [attributes_of(span)["rhapsody.task.attempt"] for span in executions] == [1, 2]
    assert {span.status.status_code for span in executions} == {StatusCode.ERROR}
    canceled = spans.named("task second")
    assert canceled.status.status_code is StatusCode.UNSET
    assert attributes_of(canceled)["rhapsody.task.cause"] == "upstream"
    assert set(spans.tree(canceled)) == {"submission", "queue"}


async def test_each_rank_of_a_job_has_a_span_below_the_execution(spans: Spans) -> None:
    ranks = (RankOutcome(0, "node-a", 11, 0), RankOutcome(1, "node-b", 12, 3, cause=Cause.ERROR, error="exit code 3"))
    failed = outcome_of(state=TaskState.FAILED, cause=Cause.ERROR, error="rank 1", ranks=ranks, nodes=("a", "b"))
    async with open_agent(backend=failed) as agent:
        await run(agent, echo("job", ranks=2))
    execution = spans.named("execution")
    assert attributes_of(execution)["rhapsody.task.nodes"] == ("a", "b")
    first, second = spans.below(execution)
    assert (first.name, second.name) == ("rank 0", "rank 1")
    expected = {"rhapsody.rank": 1, "host.name": "node-b", "process.pid": 12, "process.exit.code": 3}
    assert attributes_of(second) == {**expected, "error.type": "error"}
    assert (first.status.status_code, second.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)


async def test_a_prompt_tells_its_model_and_its_tokens(spans: Spans) -> None:
    async with open_agent(backend=outcome_of(usage=Usage(7, 3))) as agent:
        await run(agent, {"name": "ask", "prompt": "hello", "model": "small"})
    told = attributes_of(spans.named("task ask"))
    assert {name: value for name, value in told.items() if name.startswith("gen_ai.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "small",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
    }


async def test_above_a_thousand_tasks_of_a_call_one_of_each_hundred_has_spans(spans: Spans) -> None:
    backend = ScriptedBackend(lambda spec, values: 1)
    async with open_agent(backend=backend) as agent:
        await run(agent, sweep(2000))
        await run(agent, echo("first"))
    items = [span for span in spans.all() if span.name.startswith("task sweep[")]
    # the for_each is the first of the 1,000
    assert len(items) == 999 + 10
    spans.named("task first")
    flags = Counter(int(run.variables["TRACEPARENT"][-2:], 16) & 1 for run in backend.received)
    assert flags == {1: 999 + 10 + 1, 0: 991}


async def test_of_the_others_what_failed_has_spans_up_to_the_same_bound(spans: Spans) -> None:
    def script(spec: Any, values: object) -> object:
        if int(spec.uid.partition("[")[2][:-1]) > 1500:
            raise ValueError("it is broken")
        return 1

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        await run(agent, sweep(3000))
    items = [span for span in spans.all() if span.name.startswith("task sweep[")]
    failed = spans.named("task sweep[1501]")
    # of the 1,499 that failed, 15 are sampled anyhow; of the other 1,484, 1,000 and then 4
    assert len(items) == 999 + 20 + 1000 + 4
    assert failed.status.status_code is StatusCode.ERROR
    assert set(spans.tree(failed)) == {"queue", "execution"}
    assert failed.parent is not None and failed.parent.span_id == spans.id_of(spans.named("task sweep"))


async def test_what_runs_again_on_request_has_spans_below_that_request(spans: Spans) -> None:
    answers = iter([ValueError("not yet"), None])

    def script(spec: object, values: object) -> object:
        if (answer := next(answers)) is not None:
            raise answer
        return 1

    async with open_agent(backend=ScriptedBackend(script)) as agent:
        session = await run(agent, echo("first"))
        with spans.tracer.start_as_current_span("again"):
            await agent.call("submit_tasks", session=session, retry=["first"])
        await agent.call("wait_tasks", session=session)
    assert spans.tree(spans.named("again"))["tools/call submit_tasks"] == {"task first": EXECUTED}


async def test_a_task_of_an_earlier_service_has_a_trace_of_its_own(spans: Spans, tmp_path: Path) -> None:
    waiting = ScriptedBackend(lambda spec, values: 1)
    waiting.may_start.clear()
    async with open_agent(backend=waiting, ledger=tmp_path) as agent:
        session = await agent.session()
        await agent.call("submit_tasks", session=session, tasks=[echo("first")])
    before = [attributes_of(span)["rhapsody.task.state"] for span in spans.all() if span.name == "task first"]
    assert before == ["CANCELED"]
    restored = time.time_ns()
    async with open_agent(ledger=tmp_path) as agent:
        await agent.call("wait_tasks", session=session)
    _, task = (span for span in spans.all() if span.name == "task first")
    assert task.parent is None and task.start_time is not None and task.start_time >= restored
    assert attributes_of(task)["rhapsody.task.restored"] is True


async def test_a_sampler_that_raises_ends_the_telemetry_and_no_task(
    spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def should_sample(*_: object, **__: object) -> None:
        raise RuntimeError("it is broken")

    async with open_agent() as agent:
        session = await agent.session()
        with spans.tracer.start_as_current_span("chat"), monkeypatch.context() as patched:
            opened = agent.sessions.get(session).session
            patched.setattr(spans.task_tracer, "sampler", SimpleNamespace(should_sample=should_sample))
            await agent.call("submit_tasks", session=session, tasks=[echo("first"), echo("second", after=["first"])])
            await agent.call("wait_tasks", session=session)
        assert opened.counts == {"DONE": 2}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("rhapsody_mcp")]
    assert ours == ["the telemetry of a session ends here; its tasks go on"]


# --- metrics


def points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    data = reader.get_metrics_data()
    assert data is not None
    found = [
        metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
    ]
    return [point for metric in found for point in metric.data.data_points]


def counts(reader: InMemoryMetricReader) -> dict[str, int]:
    found = points(reader, "rhapsody.tasks")
    return {point.attributes["rhapsody.task.state"]: point.value for point in found if point.value}


async def test_metrics_count_tasks_by_state_and_measure_times_and_tokens() -> None:
    runs, may_end = asyncio.Event(), asyncio.Event()

    async def script(spec: object, values: object) -> Outcome:
        runs.set()
        await may_end.wait()
        now = time.time()
        return Outcome(state=TaskState.DONE, started=now, ended=now, usage=Usage(7, 3))

    with kept_metrics() as reader:
        async with open_agent(backend=ScriptedBackend(script)) as agent:
            session = await agent.session()
            ask = {"name": "ask", "prompt": "hello"}
            await agent.call("submit_tasks", session=session, tasks=[ask, echo("second", after=["ask"])])
            await runs.wait()
            assert counts(reader) == {"running": 1, "waiting": 1}
            may_end.set()
            await agent.call("wait_tasks", session=session)
            assert counts(reader) == {"done": 2}
        for name in ("rhapsody.task.queue.duration", "rhapsody.task.execution.duration"):
            measured = {point.attributes["rhapsody.task.kind"]: point.count for point in points(reader, name)}
            assert measured == {"prompt": 1, "executable": 1}
        tokens = {
            point.attributes["gen_ai.token.type"]: point.sum for point in points(reader, "gen_ai.client.token.usage")
        }
        assert tokens == {"input": 7, "output": 3}


# --- off


async def test_without_a_provider_there_is_no_telemetry() -> None:
    assert configured_telemetry("session") is None
    backend = ScriptedBackend(lambda spec, values: 1)
    async with open_agent(backend=backend) as agent:
        await run(agent, echo("first"))
    assert [run.variables for run in backend.received] == [{}]
