"""What a session keeps of a request, and the task that it makes of that again in a later life."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.dataflow.references import renamed
from rhapsody_mcp.runtime.requests.task_builder import make_task
from rhapsody_mcp.runtime.requests.task_request import IN_TEXTS, REFERRING, STANDING, TaskRequest, is_stand_in
from rhapsody_mcp.runtime.session_registry import OpenSession
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["read_recipe", "write_recipes"]


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request that names other tasks by their uids; `function` is the number of the registered one that it calls."""

    request: dict[str, object]
    function: int | None = None


def write_recipes(requests: Sequence[TaskRequest], made: Sequence[Task], opened: OpenSession) -> list[bytes]:
    """One for each task that was made of these requests."""
    here = {task.name: task.uid for task in made if task.name} | {task.uid: task.uid for task in made}

    def uid_of(name: str) -> str:
        return here.get(name) or opened.task(name).uid

    return [msgspec.json.encode(_recipe(request, uid_of, opened)) for request in requests]


def _recipe(request: TaskRequest, uid_of: Callable[[str], str], opened: OpenSession) -> Recipe:
    data = request.model_dump(mode="json", exclude_defaults=True)
    for field in (REFERRING | IN_TEXTS) & data.keys():
        data[field] = renamed(data[field], uid_of, texts=field in IN_TEXTS)
    for field in STANDING & data.keys():
        if is_stand_in(data[field]):
            data[field] = renamed(data[field], uid_of)
    if "after" in data:
        data["after"] = [uid_of(name) for name in data["after"]]
    registered = request.function is not None and ":" not in request.function
    return Recipe(data, opened.functions.get(str(request.function)).number if registered else None)


def read_recipe(recipe: bytes, uid: str, opened: OpenSession) -> Task:
    """The task again. Raises InvalidRequest where this version cannot make it."""
    try:
        read = msgspec.json.decode(recipe, type=Recipe)
        request = TaskRequest.model_validate(read.request)
        number = read.function
        return make_task(request, uid, opened.by_uid, lambda name: opened.functions.numbered(number or 0).source)
    except (ValueError, LookupError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"it was submitted to another version, and this one cannot read it: {error}") from error
