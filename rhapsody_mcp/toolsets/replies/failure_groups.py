"""What many tasks say alike, told once: failures by their cause, and notes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import WithJsonSchema

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.tasks import ForEach, Task, name_of
from rhapsody_mcp.toolsets.replies.base import Reply, one_line, shortened

__all__ = ["FailureGroups", "Failures", "digest_failures", "digest_notes"]

_NAMES, _ERROR_CHARS, _DETAIL_CHARS, _NOTE_CHARS = 3, 600, 200, 200
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(\.\d+)?")
_FRAME = re.compile(r'^  File "([^"\n]*)", (line \d+, in [^\n]*)((?:\n    [^\n]*)?)', re.MULTILINE)


class Failures(Reply):
    """Tasks that ended alike, but for numbers in their errors. The error and the detail are those of the first."""

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
    list[Failures],
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "object"},
            "description": "Each: cause, count, the first tasks, error and detail of one.",
        }
    ),
]


def digest_failures(tasks: Iterable[Task], share: float = 1.0) -> list[Failures]:
    """The tasks that ended otherwise than DONE, those that ended alike together: FAILED first, then by size.

    A for_each that has tasks is none of them: its tasks are.
    """
    groups: dict[tuple[bool, str, str], list[Task]] = {}
    for task in tasks:
        if task.outcome is None or task.outcome.state is TaskState.DONE:
            continue
        if not (isinstance(task, ForEach) and task.children):
            groups.setdefault(_likeness(task.outcome), []).append(task)
    largest = sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1])))
    return [_group(cause, alike, share) for (_, cause, _), alike in largest]


def _likeness(outcome: Outcome) -> tuple[bool, str, str]:
    first_line = outcome.error.partition("\n")[0]
    alike = "" if outcome.cause is Cause.UPSTREAM else _NUMBER.sub("#", first_line)
    return outcome.state is TaskState.CANCELED, str(outcome.cause), alike


def _group(cause: str, alike: list[Task], share: float) -> Failures:
    outcome = alike[0].outcome
    assert outcome is not None, "only tasks that have ended are grouped"
    detail = shortened(_detail(outcome), int(_DETAIL_CHARS * share))
    return Failures(
        cause=cause,
        error=shortened(outcome.error, int(_ERROR_CHARS * share)),
        count=len(alike),
        tasks=[name_of(task) for task in alike[:_NAMES]],
        detail=detail or None,
    )


def _detail(outcome: Outcome) -> str:
    """Where its function raised, or the last line of what it printed to stderr."""
    if outcome.cause is Cause.INVALID:  # it never ran: the frames would be this package's
        return ""
    if frames := _FRAME.findall(outcome.traceback):
        file, place, code = frames[-1]
        return f"{file}, {place}: {code.strip()}" if code else f"{file}, {place}"
    streams = [outcome.stderr, *(rank.stderr for rank in outcome.ranks if rank.error or rank.exit_code)]
    last = next((stream.text.rstrip() for stream in streams if stream.text.strip()), "")
    line = last[last.rfind("\n") + 1 :]
    return f"stderr: {line}" if line and line not in outcome.error else ""


def _likeness_of_note(note: str) -> str:
    """But for its numbers; how many attempts a task took is its own."""
    own, mark, rest = note.partition("; ") if note.startswith("attempt ") else ("", "", note)
    return own + mark + _NUMBER.sub("#", rest)


def digest_notes(tasks: Iterable[Task], most: int) -> list[str]:
    """What was noted about how they ran, as in `3 tasks: 2 ranks share 1 core`."""
    noted: dict[str, list[tuple[Task, str]]] = {}
    for task in tasks:
        for note in task.notes:
            noted.setdefault(_likeness_of_note(note), []).append((task, note))
    told = []
    for alike in list(noted.values())[:most]:
        task, note = alike[0]
        who = name_of(task) if len(alike) == 1 else f"{len(alike)} tasks, such as {name_of(task)}"
        told.append(f"{who}: {shortened(note, _NOTE_CHARS)}")
    return told
