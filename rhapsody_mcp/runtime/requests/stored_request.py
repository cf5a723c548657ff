"""The stored form of task requests in the ledger, and the tasks that a restarted service makes from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, UnknownName
from rhapsody_mcp.runtime.dataflow.references import rename_references
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.task_builder import make_task
from rhapsody_mcp.runtime.requests.task_request import (
    DATA_FIELDS,
    STAND_IN_FIELDS,
    TEXT_FIELDS,
    TaskRequest,
    is_stand_in,
)
from rhapsody_mcp.runtime.tasks import Task, with_children

__all__ = ["encode_requests", "read_stored_request"]

Fields: TypeAlias = dict[str, Any]
VERSION = 1
"""The version of the fields of a stored request. A field that is renamed, removed or given another meaning needs the
next version, and a function in UPGRADES; a new field with a default needs neither."""
UPGRADES: dict[int, Callable[[Fields], Fields]] = {}
"""By version, the function that converts fields to the next version."""


class StoredRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request whose references are uids. `function` is the number of the registered function that the task calls.

    Stored requests of version 1 have no `version`.
    """

    request: Fields
    function: int | None = None
    version: int = 1


def encode_requests(requests: Sequence[TaskRequest], tasks: Sequence[Task], session: OpenSession) -> list[bytes]:
    """The stored form of each request. `tasks` are the tasks of the requests, in the same order."""
    every = list(with_children(tasks))
    uids = {task.name: task.uid for task in every if task.name} | {task.uid: task.uid for task in every}

    def uid_of(name: str) -> str:
        return uids.get(name) or session.task(name).uid

    return [msgspec.json.encode(_stored(request, uid_of, session)) for request in requests]


def _stored(request: TaskRequest, uid_of: Callable[[str], str], session: OpenSession) -> StoredRequest:
    fields = request.model_dump(mode="json", exclude_defaults=True)
    for field in (DATA_FIELDS | TEXT_FIELDS) & fields.keys():
        fields[field] = rename_references(fields[field], uid_of, texts=field in TEXT_FIELDS)
    for field in STAND_IN_FIELDS & fields.keys():
        if is_stand_in(fields[field]):
            fields[field] = rename_references(fields[field], uid_of)
    if "ref" in fields.get("when", ()):
        fields["when"] |= {"ref": uid_of(fields["when"]["ref"])}
    if "after" in fields:
        fields["after"] = [uid_of(name) for name in fields["after"]]
    registered = request.function is not None and ":" not in request.function
    number = session.functions.get(str(request.function)).number if registered else None
    return StoredRequest(fields, number, VERSION)


def read_stored_request(data: bytes, uid: str, session: OpenSession) -> Task:
    """The task of a stored request, with this uid.

    Raises InvalidRequest where this version cannot read the request, and UnknownName for a task that it needs and that
    is not restored yet.
    """
    try:
        stored = msgspec.json.decode(data, type=StoredRequest)
        request = TaskRequest.model_validate(_upgraded(stored))
        number = stored.function or 0
        return make_task(request, uid, session.by_uid, lambda _: session.functions.by_number(number).source)
    except UnknownName:
        raise
    except (ValueError, LookupError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"it was submitted to another version, and this one cannot read it: {error}") from error


def _upgraded(stored: StoredRequest) -> Fields:
    if stored.version > VERSION:
        raise InvalidRequest(f"its stored form has version {stored.version}, and this program knows up to {VERSION}")
    fields = stored.request
    for version in range(stored.version, VERSION):
        fields = UPGRADES[version](fields)
    return fields
