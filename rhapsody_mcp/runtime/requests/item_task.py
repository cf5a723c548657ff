"""Makes the task for one item of a for_each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.dataflow.item_template import as_text, holds_item, with_item
from rhapsody_mcp.runtime.dataflow.references import is_literal
from rhapsody_mcp.runtime.requests.single_task import TaskNamed, backend_kwargs, fields_of, form_of, make_single_task
from rhapsody_mcp.runtime.requests.task_request import STANDING, TaskRequest, is_stand_in
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Part, Task

__all__ = ["ItemTaskFactory", "refuse_item"]


class ItemTaskFactory:
    """Makes the task for one item of a for_each; `request` is what was asked for."""

    def __init__(self, request: TaskRequest, task_named: TaskNamed, function: Source | Module | None) -> None:
        self.request = request.model_copy(update={"for_each": None})
        self._task_named, self._function = task_named, function
        self._form, self._fields = form_of(self.request), fields_of(self.request)
        self._places = {
            field: value
            for field in _PLACES
            if (value := self._fields[field]) is not None and (field not in STANDING or _holds_item(field, value))
        }
        if not isinstance(request.for_each, int) and not any(_holds_item(*place) for place in self._places.items()):
            raise InvalidTask(
                'for_each is given, and nothing stands for the item. Put {"item": true} into args, kwargs, arguments, '
                "prompt or a field of its sampling, or {item} into a text there."
            )
        if request.process_templates and holds_item([group.template for group in request.process_templates]):
            raise InvalidTask("process_templates hold no {item}; give the task ranks, env and cwd.")
        self._kwargs = None if {"env", "cwd"} & self._places.keys() else backend_kwargs(self._form, self._fields)

    def __call__(self, item: Any, number: int) -> ComputeTask | AITask:
        places = {field: with_item(value, item) for field, value in self._places.items()}
        for field in ("arguments", "prompt", "system_prompt"):
            if field in places:
                places[field] = _told(places[field])
        if "messages" in places:
            places["messages"] = _joined(places["messages"])
        fields = {**self._fields, **places}
        kwargs = backend_kwargs(self._form, fields) if self._kwargs is None else self._kwargs
        return make_single_task(self._form, fields, kwargs, self._task_named, self._function, {})


def _joined(messages: Sequence[Any]) -> list[Any]:
    """With the messages of an item, which may be one or a list of them, in the place of what stands for it."""
    joined: list[Any] = []
    for message in messages:
        if not is_literal(message):
            joined.append(_told(message))
        elif isinstance(message["literal"], list):
            joined += [{"literal": one} for one in message["literal"]]
        else:
            joined.append(message)
    return joined


def _told(value: Any) -> Any:
    """Items as texts, where a program or a model gets them."""
    if isinstance(value, list):
        return [_told(part) for part in value]
    if not isinstance(value, dict):
        return value
    if not is_literal(value):
        return {key: _told(part) for key, part in value.items()}
    item = value["literal"]
    return value if isinstance(item, Task | Part) else as_text(item)


def refuse_item(fields: Mapping[str, Any]) -> None:
    """Raise InvalidTask where one of the fields holds a placeholder for an item."""
    if any(_holds_item(field, value) for field in _PLACES if (value := fields[field]) is not None):
        raise InvalidTask(
            '{item} and {"item": true} stand for an item of for_each, which is not given; what is data goes in as '
            '{"literal": ...}.'
        )


def _holds_item(field: str, value: Any) -> bool:
    """Only as a whole a JSON schema stands for an item: it may have a property of that name."""
    if field == "json_schema":
        return is_stand_in(value) and "item" in value
    return holds_item(value)


_PLACES = (
    *("args", "kwargs", "executable", "arguments", "prompt", "messages", "system_prompt", "env", "cwd"),
    *STANDING,
)
"""Where an item may stand."""
