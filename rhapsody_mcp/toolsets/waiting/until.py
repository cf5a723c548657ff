"""The condition at which a wait ends: a number that a task tells, or a text that it prints."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.live.progress import Progress, progress_text
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of
from rhapsody_mcp.toolsets.output.feed import OutputFeed
from rhapsody_mcp.toolsets.output.sources import rank_count
from rhapsody_mcp.toolsets.replies.formatting import limited_list

__all__ = ["Answer", "Condition", "Until", "UntilField"]

_FIELDS_SHOWN = 10
_PIECE_BYTES = 1024 * 1024
_PIECES_A_LOOK = 8
_SEARCHES_AT_ONCE = 16
_CHARS_BEFORE, _CHARS_AFTER = 230, 70
_KEPT_CHARS = 1000
"""How much of a line that has no end yet is searched again with what follows."""


class Until(BaseModel):
    """The last value of a number that the task tells is below or above another, or its output has a text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    field: str | None = None
    below: float | None = None
    above: float | None = None
    text: Annotated[str | None, Field(min_length=1, max_length=200)] = None

    @model_validator(mode="after")
    def _is_one_condition(self) -> Until:
        has_bound = self.below is not None or self.above is not None
        if has_bound != (self.field is not None) or has_bound == (self.text is not None):
            raise ValueError(
                'either a field that the task tells with below or above, as in {"task": "train", "field": "loss", '
                '"below": 0.6}, or a text that it prints, as in {"task": "train", "text": "saved"}'
            )
        return self

    def holds_for(self, progress: Progress) -> bool:
        value = progress.value_of(self.field or "")
        is_below = value is not None and (self.below is None or value < self.below)
        return value is not None and is_below and (self.above is None or value > self.above)

    @property
    def what(self) -> str:
        """As in `loss below 0.6`."""
        if self.text is not None:
            return f"text {self.text!r} in its output"
        bounds = [("above", self.above), ("below", self.below)]
        return f"{self.field} {' and '.join(f'{word} {bound:g}' for word, bound in bounds if bound is not None)}"


_KINDS = {"task": "string", "field": "string", "below": "number", "above": "number", "text": "string"}
UntilField = Annotated[
    Until | None,
    WithJsonSchema({"type": "object", "properties": {name: {"type": kind} for name, kind in _KINDS.items()}}),
    Field(
        description=(
            'Return once a task tells or prints this, e.g. {"task": "train", "field": "loss", "below": 0.6} or '
            '{"task": "train", "text": "saved"}.'
        )
    ),
]


class Answer(NamedTuple):
    """Whether the condition was met, and a sentence about it."""

    is_met: bool
    text: str


class Condition:
    """A condition on a task, or on any task of a for_each or rank of a job."""

    def __init__(self, open_session: OpenSession, until: Until) -> None:
        """Raises UnknownName for the task, and InvalidRequest for a prompt."""
        self.until = until
        self._session, self._task = open_session.session, open_session.task(until.task)
        self._undecided: list[Task] | None = None
        self._searches: dict[str, list[_TextSearch]] = {}
        if self._task.kind == "ai":
            raise InvalidRequest(f"{name_of(self._task)} is a prompt, which tells and prints nothing while it runs.")

    @property
    def has_ended(self) -> bool:
        """Whether the task has, and with it all that may meet the condition."""
        return self._task.state.final

    async def answer(self) -> Answer | None:
        """The answer; None while the condition is not met and may still be."""
        while True:
            had_ended = self.has_ended  # what the task does during the search, the next one sees
            if met := await self._met():
                return Answer(True, met)
            if had_ended:
                return Answer(False, self._missed(leaves([self._task])))
            if not self.has_ended:
                return None

    async def _met(self) -> str:
        """What has met it; empty while nothing has. A task that has ended without is not looked at again."""
        if self._undecided is None or self._undecided == [self._task]:
            self._undecided = leaves([self._task])
        if self.until.text is not None:
            met = await self._met_by_text(self._undecided)
            self._undecided = [task for task in self._undecided if not self._is_searched(task)]
        else:
            met = self._met_by_number(self._undecided)
            self._undecided = [task for task in self._undecided if task.outcome is None]
        return met

    def _met_by_number(self, tasks: Iterable[Task]) -> str:
        for task in tasks:
            if task.progress is not None and self.until.holds_for(task.progress):
                return f"{name_of(task)} {task.state} has {self.until.what}: {progress_text(task.progress)}"
        return ""

    async def _met_by_text(self, tasks: Iterable[Task]) -> str:
        printing = (task for task in tasks if task.state is TaskState.RUNNING or task.outcome is not None)
        searches = (search for task in printing for search in self._searches_in(task))
        while some := list(islice(searches, _SEARCHES_AT_ONCE)):
            lines = await asyncio.gather(*(search.find() for search in some))
            for search, line in zip(some, lines, strict=True):
                if line:
                    return f"{name_of(search.task)} {search.task.state} printed: {line}"
        return ""

    def _searches_in(self, task: Task) -> list[_TextSearch]:
        if task.uid not in self._searches:
            feeds = [OutputFeed(self._session, task, rank) for rank in range(rank_count(task))]
            self._searches[task.uid] = [_TextSearch(task, feed, self.until.text or "") for feed in feeds]
        return self._searches[task.uid]

    def _is_searched(self, task: Task) -> bool:
        """Whether the search in the task's output is over; its searches are then forgotten."""
        is_searched = task.uid in self._searches and all(search.feed.is_over for search in self._searches[task.uid])
        if is_searched:
            del self._searches[task.uid]
        return is_searched

    @property
    def so_far(self) -> str:
        """As in `not yet loss below 0.6 of train`, with what the task tells instead."""
        text = f"not yet {self.until.what} of {self.until.task}"
        tasks = [task for task in leaves([self._task]) if task.state is TaskState.RUNNING or task.outcome is not None]
        missing = self._missing(_told(tasks)) if tasks and self.until.field is not None else ""
        return f"{text}: so far {missing}" if missing else text

    def _missed(self, tasks: Iterable[Task]) -> str:
        ended = f"{name_of(self._task)} ended {self._task.state} without {self.until.what}"
        if self.until.text is not None:
            return ended
        told = _told(tasks)
        missing = self._missing(told)
        return f"{ended}: {missing}" if missing else f"{ended}; the last was {progress_text(told[-1])}"

    def _missing(self, told: Sequence[Progress]) -> str:
        """What was told where that has not the field; empty where it has."""
        if not told:
            return (
                "it told nothing. A function tells with rhapsody_mcp.task.progress(step, of, loss=...), a program with "
                "a line of JSON in the file $RHAPSODY_PROGRESS; what is printed is found by text"
            )
        known = list(dict.fromkeys(field for progress in told for field in progress.numbers))
        if self.until.field in {*known, "step", "of"}:
            return ""
        return f"it told {limited_list(known, _FIELDS_SHOWN) or 'no number'}"


def _told(tasks: Iterable[Task]) -> list[Progress]:
    return [task.progress for task in tasks if task.progress is not None]


class _TextSearch:
    """Looks for a text in the output of a rank, which grows, at each byte once."""

    def __init__(self, task: Task, feed: OutputFeed, text: str) -> None:
        self.task, self.feed = task, feed
        self._text = text.casefold()
        self._rests = ["", ""]

    async def find(self) -> str:
        """What of its line is around the text, case ignored; empty where there is none so far."""
        for _ in range(_PIECES_A_LOOK):  # the task may print faster than this reads
            has_grown = False
            async for stream, piece in self.feed.pieces(_PIECE_BYTES):
                has_grown |= bool(piece)
                if found := self._found(stream, piece):
                    return found
            if not has_grown:
                break
        return ""

    def _found(self, stream: int, piece: str) -> str:
        printed = self._rests[stream] + piece
        self._rests[stream] = printed[printed.rfind("\n") + 1 :][-_KEPT_CHARS:]
        return _line_around(printed, self._text) if self._text in printed.casefold() else ""


def _line_around(printed: str, text: str) -> str:
    """The line with the text; of a long line, what is around the text."""
    end = bisect_left(range(len(printed)), True, key=lambda length: text in printed[:length].casefold())
    line_start, line_end = printed.rfind("\n", 0, end) + 1, printed.find("\n", end)
    start = max(line_start, end - _CHARS_BEFORE)
    stop = min(line_end if line_end >= 0 else len(printed), end + _CHARS_AFTER)
    begins, ends = start == line_start, stop in (line_end, len(printed))
    return f"{'' if begins else '... '}{printed[start:stop].strip()}{'' if ends else ' ...'}"
