"""Lines of bash that run before an engine or a task, and which of them has failed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PATH_BEFORE", "RESTORE_PATH", "SETUP", "failed_line", "line_failure", "run_lines", "with_setup"]

SETUP = "setup"
"""Suffix of the file with what the lines of a task have printed. It is there until all lines have ended well."""
PATH_BEFORE = "RHAPSODY_PATH"
RESTORE_PATH = f'PATH="${{{PATH_BEFORE}:+${PATH_BEFORE}:}}$PATH"'
"""A login shell may replace PATH: this puts the folders of the variable RHAPSODY_PATH first."""
_MARK = "rhapsody-setup-line-"
_LINES_SHOWN, _CHARS_SHOWN = 5, 500


def run_lines(lines: Sequence[str], mark: str) -> list[str]:
    """The steps of a script that runs the lines until one fails, and says before each `mark` and its number."""
    return [f"echo {mark}{number}; eval {shlex.quote(line)} || exit" for number, line in enumerate(lines, 1)]


def line_failure(lines: Sequence[str], mark: str, said: str, how: str) -> str:
    """Which line has failed and what it said, after a script of these steps has said this."""
    number, _, output = said.rpartition(mark)[2].partition("\n")
    line = lines[int(number) - 1] if number.isdecimal() else "what the login shell does by itself"
    shown = f": {' | '.join(output.strip().splitlines()[-_LINES_SHOWN:])[-_CHARS_SHOWN:]}" if output.strip() else ""
    return f"{line!r} {how}{shown}"


def with_setup(lines: Sequence[str], path: str, command: Sequence[str]) -> list[str]:
    """The command that runs the lines of the task with this path in a login shell, and then its own command."""
    record = shlex.quote(f"{path}.{SETUP}")
    script = [
        f"exec 3>&1 4>&2 >{record} 2>&1",
        RESTORE_PATH,
        *run_lines(lines, _MARK),
        f"exec >&3 2>&4 3>&- 4>&-; unset {PATH_BEFORE}; command -p rm -f {record}",
        'exec "$@"',
    ]
    return ["bash", "-l", "-c", "\n".join(script), "bash", *command]


def failed_line(lines: Sequence[str], path: str, how: str) -> str:
    """Why the task with this path could not be set up; empty where it was."""
    if not lines or not os.path.exists(f"{path}.{SETUP}"):
        return ""
    said = Path(f"{path}.{SETUP}").read_text(encoding="utf-8", errors="replace")
    return f"its setup failed: {line_failure(lines, _MARK, said, how)}. Try the lines in `bash -l`."
