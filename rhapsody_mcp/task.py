"""For the code of tasks: tells how far the task is.

This module imports little and works in every Python from 3.10 on, so that programs can use it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

__all__ = ["progress"]

VARIABLE = "RHAPSODY_PROGRESS"
"""Environment variable with the path of a file. Each line that a task appends to it is one JSON object, as in
`{"step": 3, "of": 20, "message": "epoch 3", "loss": 0.4}`; every key may be left out."""


def progress(step: float | None = None, of: float | None = None, message: str = "", **numbers: Any) -> None:
    """Tell that `step` of `of` is done, with a message and numbers, as in `progress(3, 20, "epoch 3", loss=0.4)`.

    What a call leaves out stays as it was. Numbers may be of any type that `float` takes. Outside a task nothing
    happens. Raises TypeError for a number that is none, and for one named `task`, which a line has for the task.
    """
    if "task" in numbers:
        raise TypeError("task is no name for a number: a line names the task with it.")
    given = {"step": step, "of": of, **numbers}
    line: dict[str, Any] = {name: _number(name, value) for name, value in given.items() if value is not None}
    if message:
        line["message"] = str(message)
    current.tell(line)
    if path := os.environ.get(VARIABLE):
        _append(path, json.dumps({"task": current.uid, **line} if current.uid else line))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is a {type(value).__name__}, {value!r}; progress takes numbers, and one message."
        ) from None
    return value if type(value) is int else number


def _append(path: str, line: str) -> None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:  # the task ended, and this process was left
        return
    try:
        os.write(file, f"{line}\n".encode())
    except OSError:  # the disk is full: the task is worth more than its progress
        return
    finally:
        os.close(file)


class _Current:
    """The task that this process runs, set by a worker that runs one function after the other."""

    def __init__(self) -> None:
        self.uid = ""
        self.tell: Callable[[dict[str, Any]], None] = lambda line: None


current = _Current()
