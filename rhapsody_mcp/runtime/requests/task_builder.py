"""Makes the task of one request."""

from __future__ import annotations

from typing import Any

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.dataflow.references import resolve
from rhapsody_mcp.runtime.requests.item_task import ItemTaskFactory, refuse_item
from rhapsody_mcp.runtime.requests.single_task import (
    FunctionNamed,
    TaskNamed,
    backend_kwargs,
    condition_of,
    fields_of,
    form_of,
    function_of,
    make_single_task,
)
from rhapsody_mcp.runtime.requests.task_request import TaskRequest, condition_value
from rhapsody_mcp.runtime.tasks import Condition, ForEach, Part, Task

__all__ = ["make_task"]


def make_task(request: TaskRequest, uid: str, task_named: TaskNamed, function_named: FunctionNamed) -> Task:
    """The task of a request, with this uid. Raises InvalidTask."""
    common: dict[str, Any] = {
        "uid": uid,
        "name": request.name,
        "backend": request.backend,
        "after": [task_named(name) for name in request.after or ()],
        "retries": request.retries,
        "retry_delay_s": request.retry_delay_s,
        "on_upstream_failure": request.on_upstream_failure,
        "priority": request.priority,
        "when": _condition(request, task_named),
    }
    if request.for_each is None:
        fields, form = fields_of(request), form_of(request)
        refuse_item(fields)
        return make_single_task(
            form, fields, backend_kwargs(form, fields), task_named, function_of(request, function_named), common
        )
    uses = [task_named(name) for name in request.model_copy(update={"for_each": None, "when": None}).references()]
    factory = ItemTaskFactory(request, task_named, function_of(request, function_named))
    return ForEach(_items(request, task_named), factory, uses=uses, **common)


def _condition(request: TaskRequest, task_named: TaskNamed) -> Condition | None:
    """The condition for the task as a whole; one on the item belongs to each task of the for_each."""
    if request.when is None:
        return None
    value = condition_value(request.when)
    if "ref" in value:
        return condition_of(request.when, task_named(value["ref"]))
    if request.for_each is None:
        raise InvalidTask('"item" in when stands for an item of for_each, which is not given.', field="when")
    return None


def _items(request: TaskRequest, task_named: TaskNamed) -> Any:
    if isinstance(request.for_each, int):
        return list(range(request.for_each))
    items = resolve(request.for_each, task_named)
    if not isinstance(items, list | Task | Part):
        raise InvalidTask('for_each is a list, or a reference to one, as in {"ref": "samples"}.', field="for_each")
    return items
