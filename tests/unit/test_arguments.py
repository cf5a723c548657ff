"""What programs get for results, and which arguments no task takes."""

from __future__ import annotations

import os
import pickle
from pathlib import PurePosixPath
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask
from rhapsody_mcp.engine.task.arguments import arguments_of
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Command
from rhapsody_mcp.model.values import NOTHING, Ref, Value, load


class Scalar:
    """Has what NumPy's numbers and arrays have."""

    def tolist(self) -> int:
        return 3


def text(value: Any, path: str = "") -> str:
    """What a program gets for a task's pickled result."""
    data = pickle.dumps(value)
    bound = {"task.000001": Value("pickle", type(value).__name__, len(data), data)}
    return arguments_of(Command("echo", ("-n", Ref("task.000001", path))), bound, load)[2]


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ("a b", "a b"),
        (1.5, "1.5"),
        (None, "null"),
        ([float("nan"), float("inf"), 1], "[NaN,Infinity,1]"),
        ({"x": (1, "é")}, '{"x":[1,"é"]}'),
        (Scalar(), "3"),
        ({"best": Scalar(), "at": PurePosixPath("/tmp")}, '{"best":3,"at":"/tmp"}'),
        ({1}, "[1]"),
        (b"caf\xe9", os.fsdecode(b"caf\xe9")),
    ],
)
def test_text_is_as_it_is_and_the_rest_is_json(value: Any, given: str) -> None:
    assert text(value) == given


def test_a_result_that_is_not_there_is_null() -> None:
    assert arguments_of(Command("echo", (Ref("task.000001", "/x"),)), {"task.000001": NOTHING}, load) == [
        "echo",
        "null",
    ]


def test_what_no_program_can_get_is_named_with_what_to_do() -> None:
    with pytest.raises(InvalidTask, match=r"the result of task.000001 at /x, a complex, is no argument.*plain data"):
        text({"x": 1j}, "/x")
    with pytest.raises(InvalidTask, match="path '/y' leads nowhere"):
        text({"x": 1}, "/y")


ODD = os.fsdecode(b"caf\xe9.txt")


@pytest.mark.parametrize(
    ("field", "task"),
    [
        ("arguments", {"executable": "cat", "arguments": [ODD]}),
        ("executable", {"executable": ODD}),
        ("env", {"executable": "cat", "task_backend_specific_kwargs": {"process_template": {"env": {"A": ODD}}}}),
        ("cwd", {"executable": "cat", "task_backend_specific_kwargs": {"process_template": {"cwd": ODD}}}),
        ("arguments", {"executable": "cat", "arguments": [b"caf"]}),
    ],
)
def test_what_no_message_can_hold_is_refused_before_anything_is_taken(field: str, task: dict[str, Any]) -> None:
    with pytest.raises(InvalidTask, match=rf"^{field} holds"):
        ComputeTask(**task)
