"""Submits the tasks of one call, all of them or none, and once for an idempotency key."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence

from mcp.types import CallToolResult

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.recovery.recorder import Submission
from rhapsody_mcp.runtime.requests.stored_request import encode_requests
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.tasks import Task, name_of
from rhapsody_mcp.toolsets.replies.formatting import NAMES_SHOWN, limited_list
from rhapsody_mcp.toolsets.submission.prepared import labeled_errors, prepare_tasks
from rhapsody_mcp.toolsets.submission.report import SubmissionReport, report_fields, submission_report, uid_range
from rhapsody_mcp.toolsets.submission.suspicious_texts import suspicious_texts
from rhapsody_mcp.toolsets.tooling.background import to_thread_if_large

__all__ = ["repeated_submission", "submit"]

_TEXTS_SHOWN = 3


async def submit(open_session: OpenSession, requests: Sequence[TaskRequest], key: str | None) -> CallToolResult:
    """Submit all tasks or none; with the key of an earlier call, reply for the tasks of that call.

    A cancellation of this call does not interrupt the submission: a repeated call with the key finds the tasks.
    """
    return await asyncio.shield(asyncio.ensure_future(_submit(open_session, requests, key)))


async def _submit(open_session: OpenSession, requests: Sequence[TaskRequest], key: str | None) -> CallToolResult:
    async with open_session.naming_lock:
        if (repeated := repeated_submission(open_session, requests, key)) is not None:
            return repeated
        tasks = await prepare_tasks(open_session, requests)
        replaced = [
            earlier for request in requests if request.name and (earlier := open_session.name_holder(request.name))
        ]
        await _take(open_session, requests, tasks, key)
    await open_session.session.wait_expanded(tasks)
    texts = (await to_thread_if_large(suspicious_texts, requests, open_session, tasks))[:_TEXTS_SHOWN]
    notes = [f"Note: {text}." for text in texts]
    if canceled := _canceled_with(replaced, open_session):
        names = limited_list(canceled, NAMES_SHOWN, ", ...")
        notes.append(
            f"{names} had ended CANCELED because of what this replaces: what is still wanted is to be submitted again."
        )
    data = SubmissionReport(**report_fields(open_session, tasks), problems=texts or None)
    return submission_report(data, notes)


async def _take(
    open_session: OpenSession, requests: Sequence[TaskRequest], tasks: Sequence[Task], key: str | None
) -> None:
    """Write the tasks down where there is a ledger, and hand them to the session."""
    submission = None
    if key is not None:
        submission = Submission(key, await to_thread_if_large(_digest, requests), tuple(tasks))
    stored = await to_thread_if_large(encode_requests, requests, tasks, open_session) if open_session.recorder else ()
    with labeled_errors(requests, tasks):
        asks_python = any(request.python for request in requests)  # which may take seconds to answer
        check = asyncio.to_thread if asks_python else to_thread_if_large
        accepted = await check(open_session.session.accept, tasks)
        await open_session.submit(tasks, accepted, stored, submission)


_ADDED_FIELDS = {
    *("container", "cores", "gpus", "memory_gb", "outputs", "packages", "priority", "python", "ranks_per_node"),
    *("setup", "stdout", "when"),
}
"""Fields of a request that version 0.1 did not have."""


_BECAUSE_OF_OTHERS = (Cause.UPSTREAM, Cause.SKIPPED)


def _digest(requests: Sequence[TaskRequest], *, with_defaults: bool = False) -> bytes:
    """The same for equal requests, also after a version has added a field."""
    digest = hashlib.sha256()
    for request in requests:
        unset = _ADDED_FIELDS - request.given_fields()
        digest.update(request.model_dump_json(exclude=unset, exclude_defaults=not with_defaults).encode() + b"\n")
    return digest.digest()


def _is_repeated(earlier: Submission, requests: Sequence[TaskRequest]) -> bool:
    """Whether the requests are those of the earlier call; version 0.1 kept a digest of every field."""
    return any(earlier.request_digest == _digest(requests, with_defaults=old) for old in (False, True))


def repeated_submission(
    open_session: OpenSession, requests: Sequence[TaskRequest], key: str | None
) -> CallToolResult | None:
    """The reply for the tasks of an earlier call with this key; None where no call had the key.

    Raises InvalidRequest where the earlier call had other requests.
    """
    if key is None or (earlier := open_session.submissions.get(key)) is None:
        return None
    tasks = earlier.tasks
    if not _is_repeated(earlier, requests):
        raise InvalidRequest(
            f"idempotency_key {key!r} belongs to a call with other tasks ({uid_range(tasks[0].uid, tasks[-1].uid)}); "
            "repeat that call as it was, or take a new key."
        )
    data = SubmissionReport(**report_fields(open_session, tasks), repeated=True)
    return submission_report(data, ["An earlier call with this key submitted them; nothing was submitted now."])


def _canceled_with(replaced: Collection[Task], open_session: OpenSession) -> list[str]:
    """The names of the tasks that were canceled because one of these tasks failed."""
    sources = {task.uid for task in replaced}
    if not sources:
        return []
    canceled = [
        task for task in open_session.session.tasks if task.cause in _BECAUSE_OF_OTHERS and not task.replaced_by
    ]
    return [name_of(task) for task in canceled if sources & {source.uid for source in task.sources()}]
