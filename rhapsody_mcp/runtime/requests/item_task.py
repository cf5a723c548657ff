"""Makes the task for one item of a for_each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.dataflow.item_template import as_text, has_placeholder, with_item
from rhapsody_mcp.runtime.dataflow.references import is_literal
from rhapsody_mcp.runtime.requests.single_task import (
    TaskNamed,
    backend_kwargs,
    condition_of,
    fields_of,
    form_of,
    make_single_task,
)
from rhapsody_mcp.runtime.requests.task_request import STAND_IN_FIELDS, TaskRequest, condition_value, is_stand_in
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Part, Task

__all__ = ["ItemTaskFactory", "refuse_item"]


class ItemTaskFactory:
    """Makes the task for an item, from the request of the for_each. Raises InvalidTask for a wrong request or item."""

    def __init__(self, request: TaskRequest, task_named: TaskNamed, function: Source | Module | None) -> None:
        self.request = request.model_copy(update={"for_each": None})
        self._task_named, self._function = task_named, function
        self._when = request.when if request.when and "item" in condition_value(request.when) else None
        self._form, self._fields = form_of(self.request), fields_of(self.request)
        self._templates = {
            field: value
            for field in _ITEM_FIELDS
            if (value := self._fields[field]) is not None
            and (field not in STAND_IN_FIELDS or _field_has_placeholder(field, value))
        }
        if not isinstance(request.for_each, int) and not any(
            _field_has_placeholder(*template) for template in self._templates.items()
        ):
            raise InvalidTask(
                'for_each is given, and nothing stands for the item. Put {"item": true} into args, kwargs, arguments, '
                "prompt or a field of its sampling, or {item} into a text there.",
                field="for_each",
            )
        if request.process_templates and has_placeholder([group.template for group in request.process_templates]):
            raise InvalidTask(
                "process_templates hold no {item}; give the task ranks, env and cwd.", field="process_templates"
            )
        is_each_its_own = {"env", "cwd", *_SOFTWARE} & self._templates.keys()
        self._kwargs = None if is_each_its_own else backend_kwargs(self._form, self._fields)

    def __call__(self, item: Any, number: int) -> ComputeTask | AITask:
        filled = {field: with_item(value, item) for field, value in self._templates.items()}
        for field in ("arguments", "prompt", "system_prompt"):
            if field in filled:
                filled[field] = _items_as_text(filled[field])
        if "messages" in filled:
            filled["messages"] = _flatten_messages(filled["messages"])
        fields = {**self._fields, **filled}
        kwargs = backend_kwargs(self._form, fields) if self._kwargs is None else self._kwargs
        when = self._when and condition_of(self._when, item)
        return make_single_task(self._form, fields, kwargs, self._task_named, self._function, {"when": when})


def _flatten_messages(messages: Sequence[Any]) -> list[Any]:
    """The messages of a chat, with the messages of an item in place. An item is one message or a list of messages."""
    flat: list[Any] = []
    for message in messages:
        if not is_literal(message):
            flat.append(_items_as_text(message))
        elif isinstance(message["literal"], list):
            flat += [{"literal": item} for item in message["literal"]]
        else:
            flat.append(message)
    return flat


def _items_as_text(value: Any) -> Any:
    """The value with items as texts, for a program or a model."""
    if isinstance(value, list):
        return [_items_as_text(part) for part in value]
    if not isinstance(value, dict):
        return value
    if not is_literal(value):
        return {key: _items_as_text(part) for key, part in value.items()}
    item = value["literal"]
    return value if isinstance(item, Task | Part) else as_text(item)


def refuse_item(fields: Mapping[str, Any]) -> None:
    """Raise InvalidTask where one of the fields holds a placeholder for an item."""
    if any(_field_has_placeholder(field, value) for field in _ITEM_FIELDS if (value := fields[field]) is not None):
        raise InvalidTask(
            '{item} and {"item": true} stand for an item of for_each, which is not given; what is data goes in as '
            '{"literal": ...}.'
        )


def _field_has_placeholder(field: str, value: Any) -> bool:
    """Whether a field holds a placeholder. Inside a JSON schema, `item` may be the name of a property."""
    if field == "json_schema":
        return is_stand_in(value) and "item" in value
    return has_placeholder(value)


_SOFTWARE = ("python", "packages", "container", "setup")
_ITEM_FIELDS = (
    *("args", "kwargs", "executable", "arguments", "prompt", "messages", "system_prompt", "env", "cwd", "outputs"),
    *_SOFTWARE,
    *STAND_IN_FIELDS,
)
"""The fields that may hold a placeholder."""
