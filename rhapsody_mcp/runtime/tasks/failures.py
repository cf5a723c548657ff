"""What two failures have in common, and where a task failed."""

from __future__ import annotations

import re

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.states import Cause, TaskState

__all__ = ["NUMBER", "failure_key", "failure_place", "is_failure"]

NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(\.\d+)?")
"""What may differ in texts that mean the same."""
_FRAME = re.compile(r'^  File "([^"\n]*)", (line \d+, in [^\n]*)((?:\n    [^\n]*)?)', re.MULTILINE)


def is_failure(outcome: Outcome) -> bool:
    """Whether a task ended FAILED or CANCELED, and was not skipped."""
    return outcome.state is not TaskState.DONE and outcome.cause is not Cause.SKIPPED


def failure_key(outcome: Outcome) -> tuple[bool, str, str]:
    """Equal for failures of one kind: whether the task was canceled, the cause, and the first line of the error without
    numbers."""
    first_line = outcome.error.partition("\n")[0]
    error = "" if outcome.cause is Cause.UPSTREAM else NUMBER.sub("#", first_line)
    return outcome.state is TaskState.CANCELED, str(outcome.cause), error


def failure_place(outcome: Outcome) -> str:
    """Where the function raised, as `FILE, line 3, in NAME: CODE`, or the last line of stderr; may be empty."""
    if outcome.cause is Cause.INVALID:  # the task never ran: the frames are this package's
        return ""
    if frames := _FRAME.findall(outcome.traceback):
        file, place, code = frames[-1]
        return f"{file}, {place}: {code.strip()}" if code else f"{file}, {place}"
    streams = [outcome.stderr, *(rank.stderr for rank in outcome.ranks if rank.error or rank.exit_code)]
    last = next((stream.text.rstrip() for stream in streams if stream.text.strip()), "")
    line = last[last.rfind("\n") + 1 :]
    return f"stderr: {line}" if line and line not in outcome.error else ""
