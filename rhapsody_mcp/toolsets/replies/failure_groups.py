"""Groups the failures and the notes of many tasks where their texts differ only in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import WithJsonSchema

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of
from rhapsody_mcp.runtime.tasks.failures import NUMBER, failure_key, failure_place, is_failure
from rhapsody_mcp.toolsets.replies.base import Reply
from rhapsody_mcp.toolsets.replies.formatting import limited_list, one_line, shortened

__all__ = ["FailureGroup", "FailureGroups", "group_failures", "group_notes"]

_NAMES_SHOWN, _ERROR_CHARS, _DETAIL_CHARS, _NOTE_CHARS = 3, 600, 300, 200
_RANKS_SHOWN, _RANK_GROUPS, _RANK_CHARS = 8, 3, 60


class FailureGroup(Reply):
    """Tasks whose errors differ only in numbers. The error and the detail are the first task's."""

    cause: str
    error: str
    count: int
    tasks: list[str]
    detail: str | None = None

    def line(self) -> str:
        """As in `2 tasks (fit-1, fit-2) ended with cause error: ValueError: ...`."""
        names = ", ".join(self.tasks) + (", ..." if self.count > len(self.tasks) else "")
        who = names if self.count == 1 else f"{self.count} tasks ({names})"
        detail = f" [{one_line(self.detail)}]" if self.detail else ""
        return f"{who} ended with cause {self.cause}: {one_line(self.error)}{detail}"


FailureGroups = Annotated[
    list[FailureGroup],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "object"},
        }
    ),
]


def group_failures(tasks: Iterable[Task], share: float = 1.0) -> list[FailureGroup]:
    """The tasks that ended FAILED or CANCELED, except skipped ones, in groups: FAILED first, then by size.

    A for_each that has children is in no group: its children are.
    """
    groups: dict[tuple[bool, str, str], list[Task]] = {}
    for task in tasks:
        if task.outcome is None or not is_failure(task.outcome):
            continue
        if not (isinstance(task, ForEach) and task.children):
            groups.setdefault(failure_key(task.outcome), []).append(task)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1])))
    return [_group(cause, members, share) for (_, cause, _), members in ordered]


def _group(cause: str, members: list[Task], share: float) -> FailureGroup:
    outcome = members[0].outcome
    assert outcome is not None, "only tasks that have ended are grouped"
    detail = shortened(_detail(outcome), int(_DETAIL_CHARS * share))
    return FailureGroup(
        cause=cause,
        error=shortened(outcome.error, int(_ERROR_CHARS * share)),
        count=len(members),
        tasks=[name_of(task) for task in members[:_NAMES_SHOWN]],
        detail=detail or None,
    )


def _detail(outcome: Outcome) -> str:
    """The place where the function raised or the last line of stderr, and what came of the other ranks of a job."""
    return "; ".join(filter(None, [failure_place(outcome), _other_ranks(outcome)]))


def _other_ranks(outcome: Outcome) -> str:
    """As in `ranks 0, 2: ended well`; the error names the rank that failed first."""
    failed = next((rank for rank in outcome.ranks if outcome.error.startswith(f"rank {rank.rank} of ")), None)
    ranks: dict[str, list[str]] = {}
    for rank in outcome.ranks if failed is not None else ():
        if rank is not failed:
            came_of_it = rank.error or (f"exit code {rank.exit_code}" if rank.exit_code else "ended well")
            ranks.setdefault(shortened(one_line(came_of_it), _RANK_CHARS), []).append(str(rank.rank))
    texts = [f"{limited_list(numbers, _RANKS_SHOWN)}: {text}" for text, numbers in ranks.items()]
    return f"other ranks: {limited_list(texts, _RANK_GROUPS)}" if texts else ""


def group_notes(tasks: Iterable[Task], most: int) -> list[str]:
    """The first notes about how the tasks ran, as in `3 tasks, such as fit-1: 2 ranks share 1 core`."""
    groups: dict[str, list[tuple[Task, str]]] = {}
    for task in tasks:
        skipped = [f"skipped, {task.outcome.error}"] if task.outcome and task.cause is Cause.SKIPPED else []
        for note in (*task.notes, *skipped):
            groups.setdefault(_note_key(note), []).append((task, note))
    texts = []
    for members in list(groups.values())[:most]:
        task, note = members[0]
        who = name_of(task) if len(members) == 1 else f"{len(members)} tasks, such as {name_of(task)}"
        texts.append(f"{who}: {shortened(note, _NOTE_CHARS)}")
    return texts


def _note_key(note: str) -> str:
    """The note without numbers, except the number of attempts, which keeps notes apart."""
    attempts, mark, rest = note.partition("; ") if note.startswith("attempt ") else ("", "", note)
    return attempts + mark + NUMBER.sub("#", rest)
