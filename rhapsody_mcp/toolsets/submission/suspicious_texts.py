"""Finds texts of task requests that look like references to tasks, but are passed on as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rhapsody_mcp.runtime.dataflow.references import is_literal
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.request_batch import label_of
from rhapsody_mcp.runtime.requests.task_request import TEXT_FIELDS, TaskRequest
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["suspicious_texts"]

_SEARCHED_CHARS = 64 * 1024
_REFERENCE = re.compile(
    r'\{([A-Za-z][\w.-]{0,63})\}|\{ref: ?([\w.\[\]-]{1,64})[^{}]{0,64}\}|\$([A-Za-z][\w-]{0,63})|"ref": ?"([^"]{1,64})"'
)


def suspicious_texts(requests: Sequence[TaskRequest], open_session: OpenSession, tasks: Sequence[Task]) -> list[str]:
    """A sentence for each request with such a text; it says how to write the reference."""
    names = {task.name for task in tasks}
    sentences = []
    for index, request in enumerate(requests):
        values = [request.args, request.kwargs, request.stop_sequences, request.model]
        texts = [getattr(request, field) for field in TEXT_FIELDS]
        wrong = _suspicious(values, names, open_session, in_texts=False)
        wrong = wrong or _suspicious(texts, names, open_session, in_texts=True)
        if wrong:
            sentences.append(f"{label_of(index, request)}: {wrong}")
    return sentences


def _suspicious(values: list[Any], names: Collection[str | None], open_session: OpenSession, *, in_texts: bool) -> str:
    """What is wrong with the first such text, or the empty string. `in_texts` says whether a reference can stand within
    a text."""
    correct = "{{ref:{}}}" if in_texts else 'the value {{"ref": "{}"}}'
    for match in _REFERENCE.finditer(" ".join(_texts_in(values))[:_SEARCHED_CHARS]):
        name = next(filter(None, match.groups()))
        is_reference = match.group().startswith("{ref:")
        if not in_texts if is_reference else name in names or open_session.name_holder(name):
            return f"the text {match.group()} stays as it is; {name}'s result is {correct.format(name)}"
    return ""


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and not is_literal(value):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)
