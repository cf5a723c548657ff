"""Takes the tasks of one call, once, and says what was taken; or what would be."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.machine import Machine
from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.runtime.dataflow.references import is_literal
from rhapsody_mcp.runtime.dry_run import PlannedTask, plan_tasks, unmet_needs
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.recovery.recorder import Submission
from rhapsody_mcp.runtime.requests.request_batch import label_of, make_tasks
from rhapsody_mcp.runtime.requests.stored_request import store_requests
from rhapsody_mcp.runtime.requests.task_request import TEXT_FIELDS, TaskRequest
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of, tasks_text
from rhapsody_mcp.toolsets.replies.base import Reply, counts_text, reply
from rhapsody_mcp.toolsets.tooling.background import aside
from rhapsody_mcp.toolsets.tooling.schemas import UNTOLD

__all__ = ["Submitted", "check", "plan", "submit", "submitted_before"]

_NAMES_SHOWN = 20
_STEPS_SHOWN = 30
_SUSPECTS_SHOWN = 3
_LOOKED_AT_CHARS = 64 * 1024


class Submitted(Reply):
    """`repeated`: by an earlier call with the same key. A dry run gives `graph` and `problems`, and the ids that tasks
    would get."""

    session: str
    submitted: int
    first: Annotated[str, Field(description="Id; the others count on in order.")]
    last: str
    names: Annotated[dict[str, str], UNTOLD]
    counts: Annotated[dict[str, int], UNTOLD]
    backends: Annotated[dict[str, int], UNTOLD]
    repeated: Annotated[bool | None, UNTOLD] = None
    graph: Annotated[list[dict[str, Any]] | None, UNTOLD] = None
    problems: Annotated[list[str] | None, UNTOLD] = None


async def submit(opened: OpenSession, requests: Sequence[TaskRequest], key: str | None) -> CallToolResult:
    """Submit them whole, or refuse them whole; with a key that an earlier call had, say again what that one did.

    Whoever cancels this cancels nothing of it: what was begun is done, and a repeated call with the key finds it.
    """
    return await asyncio.shield(asyncio.ensure_future(_submit(opened, requests, key)))


async def _submit(opened: OpenSession, requests: Sequence[TaskRequest], key: str | None) -> CallToolResult:
    async with opened.submission_lock:
        if (before := submitted_before(opened, requests, key)) is not None:
            return before
        made = await aside(make_tasks, requests, opened)
        replaced = [earlier for request in requests if request.name and (earlier := opened.task_named(request.name))]
        submission = None if key is None else Submission(key, await aside(_digest, requests), tuple(made))
        stored = await aside(store_requests, requests, made, opened) if opened.recorder else ()
        try:
            accepted = await aside(opened.session.accept, made)
            await opened.submit(made, accepted, stored, submission)
        except InvalidTask as error:
            raise _by_place(error, requests, made) from error
    await opened.session.wait_expanded(made)
    suspects = (await aside(_suspects, requests, opened, made))[:_SUSPECTS_SHOWN]
    data = Submitted(**_told(opened, made), problems=suspects or None)
    notes = [f"Note: {suspect}." for suspect in suspects]
    if replaced and (left := _left_canceled(opened, replaced)):
        notes.append(left)
    return reply("\n".join([_first_line(data, "Submitted"), *notes, _next(data)]), data)


def _digest(requests: Sequence[TaskRequest]) -> bytes:
    """Alike for requests that say the same."""
    told = hashlib.sha256()
    for request in requests:
        told.update(request.model_dump_json().encode() + b"\n")
    return told.digest()


def submitted_before(opened: OpenSession, asked: Sequence[TaskRequest], key: str | None) -> CallToolResult | None:
    """The reply to a call that was made before; None where this is a new one.

    Raises InvalidRequest where the earlier call with this key asked for something else.
    """
    if key is None or (earlier := opened.submissions.get(key)) is None:
        return None
    if earlier.request_digest != _digest(asked):
        raise InvalidRequest(
            f"idempotency_key {key!r} belongs to a call with other tasks ({_span(earlier.tasks)}); "
            "repeat that call as it was, or take a new key."
        )
    data = Submitted(**_told(opened, earlier.tasks), repeated=True)
    again = "An earlier call with this key submitted them; nothing was submitted now."
    return reply(f"{_first_line(data, 'Submitted')}\n{again}\n{_next(data)}", data)


def check(opened: OpenSession, requests: Sequence[TaskRequest]) -> list[Task]:
    """The tasks that they would be, of which nothing is taken. Raises what their submission would raise."""
    made = make_tasks(requests, opened)
    try:
        opened.session.accept(made)
    except InvalidTask as error:
        raise _by_place(error, requests, made) from error
    return made


def plan(opened: OpenSession, requests: Sequence[TaskRequest], machine: Machine) -> CallToolResult:
    """What would run where, and what does not fit; every refusal of a real submission comes here too."""
    made = check(opened, requests)
    steps = plan_tasks(made, machine)
    folder = opened.config.folder
    problems = [f"{name_of(task)}: {wrong}" for task in made for wrong in unmet_needs(task, machine, folder)]
    problems += _suspects(requests, opened, made)
    data = Submitted(
        **_told(opened, made) | {"submitted": 0, "counts": {}},
        graph=[_row(step) for step in steps[:_STEPS_SHOWN]],
        problems=problems[:_STEPS_SHOWN],
    )
    return reply(_plan_text(data, steps, problems), data)


def _told(opened: OpenSession, made: Sequence[Task]) -> dict[str, Any]:
    singles = leaves(made)
    named = {task.name: task.uid for task in made if task.name}
    return {
        "session": opened.id,
        "submitted": len(made),
        "first": made[0].uid,
        "last": made[-1].uid,
        "names": named if len(named) <= _NAMES_SHOWN else {},  # of many it would be a long list of what is known
        "counts": dict(Counter(task.state.value for task in singles)),
        "backends": dict(Counter(task.backend or "" for task in singles)),
    }


def _suspects(requests: Sequence[TaskRequest], opened: OpenSession, made: Sequence[Task]) -> list[str]:
    """Texts that seem to refer to a task, and are passed on as they are."""
    named = {task.name for task in made}
    told = []
    for index, request in enumerate(requests):
        values = [request.args, request.kwargs, request.stop_sequences, request.model]
        texts = [getattr(request, field) for field in TEXT_FIELDS]
        found = _suspect(values, named, opened, in_texts=False) or _suspect(texts, named, opened, in_texts=True)
        if found:
            told.append(f"{label_of(index, request)}: {found}")
    return told


def _suspect(data: list[Any], named: Collection[str | None], opened: OpenSession, *, in_texts: bool) -> str:
    """What is wrong with the first text in it that seems to refer to a task, in words; or nothing. `in_texts` where a
    text can hold a result."""
    right = "{{ref:{}}}" if in_texts else 'the value {{"ref": "{}"}}'
    texts = " ".join(_texts_in(data))[:_LOOKED_AT_CHARS]
    for match in _REFERENCE_IN_TEXT.finditer(texts):
        name = next(filter(None, match.groups()))
        if not in_texts if match.group().startswith("{ref:") else name in named or opened.task_named(name):
            return f"the text {match.group()} stays as it is; {name}'s result is {right.format(name)}"
    return ""


_REFERENCE_IN_TEXT = re.compile(
    r'\{([A-Za-z][\w.-]{0,63})\}|\{ref: ?([\w.\[\]-]{1,64})[^{}]{0,64}\}|\$([A-Za-z][\w-]{0,63})|"ref": ?"([^"]{1,64})"'
)


def _left_canceled(opened: OpenSession, replaced: Collection[Task]) -> str:
    """The tasks that were canceled because of these, which have been replaced now."""
    sources = {task.uid for task in replaced}
    left = [
        name_of(task)
        for task in opened.session.tasks
        if task.cause is Cause.UPSTREAM and not task.replaced_by and sources & {source.uid for source in task.sources()}
    ]
    if not left:
        return ""
    names = ", ".join(left[:_NAMES_SHOWN]) + (", ..." if len(left) > _NAMES_SHOWN else "")
    return f"{names} had been canceled because of what this replaces, and do not run by themselves: submit them again."


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and not is_literal(value):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def _by_place(error: InvalidTask, requests: Sequence[TaskRequest], tasks: Sequence[Task]) -> InvalidTask:
    """The error with the place of the task in the call: the id of a task is taken only by a submission that is."""
    for index, task in enumerate(tasks):
        if error.uid in (task.uid, *(child.uid for child in leaves([task]))):
            return error.of_task(label_of(index, requests[index]))
    return error


def _span(tasks: Sequence[Task]) -> str:
    return tasks[0].uid if len(tasks) == 1 else f"{tasks[0].uid} to {tasks[-1].uid}"


def _first_line(data: Submitted, verb: str) -> str:
    span = data.first if data.first == data.last else f"{data.first} to {data.last}"
    names = f" Named: {', '.join(f'{name} = {uid}' for name, uid in data.names.items())}." if data.names else ""
    singles = sum(data.counts.values())
    each = "" if singles == data.submitted else f"{singles} with those of for_each: "
    return f"{verb} {data.submitted}: {span} ({each}{_where(data.backends)}; {counts_text(data.counts)}).{names}"


def _where(backends: Mapping[str, int]) -> str:
    return ", ".join(f"{count} on {name}" for name, count in backends.items())


def _next(data: Submitted) -> str:
    return f'Next: wait_tasks(session="{data.session}").'


def _row(step: PlannedTask) -> dict[str, Any]:
    row = {"task": name_of(step.task), "runs_as": step.runs_as, "level": step.level}
    return row | ({"waits_for": list(step.after)} if step.after else {})


def _plan_text(data: Submitted, steps: Sequence[PlannedTask], problems: Sequence[str]) -> str:
    deepest = max(step.level for step in steps)
    levels = "1 level" if deepest == 1 else f"{deepest} levels"
    lines = [f"Dry run, nothing was submitted: {tasks_text(len(steps))} in {levels} ({_where(data.backends)})."]
    for step in steps[:_STEPS_SHOWN]:
        after = f", after {', '.join(step.after)}" if step.after else ""
        lines.append(f"- {name_of(step.task)}: {step.runs_as}{after}")
    if len(steps) > _STEPS_SHOWN:
        lines.append(f"... and {len(steps) - _STEPS_SHOWN} more.")
    lines += [f"Does not fit: {problem}" for problem in problems[:_STEPS_SHOWN]] or ["Everything fits this machine."]
    lines.append(f"Next: {'correct what does not fit, or ' if problems else ''}the same call without dry_run.")
    return "\n".join(lines)
