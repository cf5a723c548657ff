"""The trace context that tasks find in their environment, on both engines."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from tests.spans import Spans, kept_spans

pytestmark = pytest.mark.anyio

PROCESS: dict[str, Any] = {"process_template": {}}
RANKS: dict[str, Any] = {"process_templates": [(2, {})]}


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    """Of a program that has set a tracer provider."""
    with kept_spans():
        async with Session([await request.param(num_workers=1)]) as session:
            yield session


def traceparent() -> str | None:
    return os.environ.get("TRACEPARENT")


def of_execution(spans: Spans, task: ComputeTask) -> str:
    """What the processes of the task should have found."""
    (span,) = [span for span in spans.all() if dict(span.attributes or {}).get("rhapsody.task.id") == task.uid]
    (execution,) = [child for child in spans.below(span) if child.name == "execution"]
    context = execution.get_span_context()
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


async def test_programs_functions_and_ranks_find_their_execution_as_the_parent_of_their_spans(session: Session) -> None:
    program = ComputeTask(executable="sh", arguments=["-c", "echo $TRACEPARENT"])
    function = ComputeTask(traceparent)
    alone = ComputeTask(traceparent, task_backend_specific_kwargs=PROCESS)
    job = ComputeTask(traceparent, task_backend_specific_kwargs=RANKS)
    tasks = [program, function, alone, job]
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=600)
    for task in (program, function, alone):
        assert task.return_value == of_execution(Spans(), task)
    assert [rank.return_value for rank in job.ranks] == [of_execution(Spans(), job)] * 2


async def test_the_ranks_of_a_job_are_below_its_execution(session: Session) -> None:
    job = ComputeTask(os.getpid, name="job", task_backend_specific_kwargs=RANKS)
    await session.submit_tasks(job)
    await session.wait_tasks(job, timeout=600)
    (execution,) = [span for span in Spans().below(Spans().named("task job")) if span.name == "execution"]
    ranks = [dict(span.attributes or {}) for span in Spans().below(execution)]
    assert [rank["process.pid"] for rank in ranks] == [rank.return_value for rank in job.ranks]


async def test_a_trace_context_of_the_task_itself_stays(session: Session) -> None:
    template = {"env": {"TRACEPARENT": "00-11111111111111111111111111111111-2222222222222222-01"}}
    task = ComputeTask(
        executable="sh",
        arguments=["-c", "echo $TRACEPARENT"],
        task_backend_specific_kwargs={"process_template": template},
    )
    await session.submit_tasks(task)
    await session.wait_tasks(task, timeout=600)
    assert task.return_value == template["env"]["TRACEPARENT"]
