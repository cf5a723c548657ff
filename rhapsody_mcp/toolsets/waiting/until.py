"""The condition at which a wait ends: a number that a task tells, or a text that it prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.live.progress import Progress, progress_text
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import Task, leaves, name_of
from rhapsody_mcp.toolsets.output.excerpts import read_excerpt
from rhapsody_mcp.toolsets.output.live import STREAMS, OutputReader
from rhapsody_mcp.toolsets.output.sources import rank_count
from rhapsody_mcp.toolsets.replies.formatting import limited_list

__all__ = ["Answer", "Condition", "Until", "UntilField"]

_FIELDS_SHOWN = 10
_PIECE_BYTES = 1024 * 1024
_PIECES_A_LOOK = 8


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
        self._searches: dict[tuple[str, int], _TextSearch] = {}
        if self._task.kind == "ai":
            raise InvalidRequest(f"{name_of(self._task)} is a prompt, which tells and prints nothing while it runs.")

    async def answer(self) -> Answer | None:
        """The answer; None while the condition is not met and may still be."""
        tasks = list(leaves([self._task]))
        met = await self._met_by_text(tasks) if self.until.text is not None else self._met_by_number(tasks)
        if met:
            return Answer(True, met)
        return Answer(False, self._missed(tasks)) if self._task.state.final else None

    def _met_by_number(self, tasks: Iterable[Task]) -> str:
        for task in tasks:
            if task.progress is not None and self.until.holds_for(task.progress):
                return f"{name_of(task)} {task.state} has {self.until.what}: {progress_text(task.progress)}"
        return ""

    async def _met_by_text(self, tasks: Iterable[Task]) -> str:
        for task in tasks:
            if task.state is TaskState.RUNNING or task.outcome is not None:
                for rank in range(rank_count(task)):
                    if line := await self._search(task, rank).find(self.until.text or ""):
                        return f"{name_of(task)} {task.state} printed: {line}"
        return ""

    def _search(self, task: Task, rank: int) -> _TextSearch:
        if (task.uid, rank) not in self._searches:
            self._searches[task.uid, rank] = _TextSearch(OutputReader(self._session, task, rank), task, rank)
        return self._searches[task.uid, rank]

    def _missed(self, tasks: Iterable[Task]) -> str:
        ended = f"{name_of(self._task)} ended {self._task.state} without {self.until.what}"
        if self.until.text is not None:
            return ended
        told = [task.progress for task in tasks if task.progress is not None]
        if not told:
            return (
                f"{ended}: it told nothing. A function tells with rhapsody_mcp.task.progress(step, of, loss=...), "
                "a program with a line of JSON in the file $RHAPSODY_PROGRESS"
            )
        known = list(dict.fromkeys(field for progress in told for field in progress.numbers))
        if self.until.field not in {*known, "step", "of"}:
            return f"{ended}: it told {limited_list(known, _FIELDS_SHOWN) or 'no number'}"
        return f"{ended}; the last was {progress_text(told[-1])}"


class _TextSearch:
    """Looks for a text in the output of a rank, which grows, at each byte once."""

    def __init__(self, reader: OutputReader, task: Task, rank: int) -> None:
        self._reader, self._task, self._rank = reader, task, rank
        self._rests: list[bytes] = [b"", b""]
        self._is_over = False

    async def find(self, text: str) -> str:
        """The line with the text, case ignored; empty where there is none so far."""
        if self._is_over:
            return ""
        for _ in range(_PIECES_A_LOOK):  # the task may print faster than this reads
            if self._task.outcome is not None:
                self._is_over = True
                return await _find_in_ended(self._task, self._rank, text)
            new = await self._reader.read(_PIECE_BYTES)
            if new is None or not any(new):
                return ""
            if line := self._line_with(text, new):
                return line
        return ""

    def _line_with(self, text: str, new: tuple[bytes, bytes]) -> str:
        for stream, data in enumerate(new):
            lines = (self._rests[stream] + data).split(b"\n")
            self._rests[stream] = lines[-1][-_PIECE_BYTES:]
            decoded = (line.decode("utf-8", "replace") for line in lines)
            if (found := next((line for line in decoded if text.casefold() in line.casefold()), None)) is not None:
                return found.strip()
        return ""


async def _find_in_ended(task: Task, rank: int, text: str) -> str:
    assert task.outcome is not None
    source: Any = task.outcome.ranks[rank] if rank < len(task.outcome.ranks) else task.outcome
    for name in STREAMS:
        excerpt = await read_excerpt(getattr(source, name), "head", text, _PIECE_BYTES)
        if excerpt.found:
            return excerpt.text.splitlines()[0].partition(": ")[2]
    return ""
