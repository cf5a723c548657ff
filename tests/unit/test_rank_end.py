"""What a program printed, as a value: short or long, text or not, with no more than a piece of it in memory."""

from __future__ import annotations

import marshal
from pathlib import Path

import pytest

from rhapsody_mcp.engine.task.rank_result import rank_end
from rhapsody_mcp.model.outcome import RankOutcome
from rhapsody_mcp.model.specs import Command, Layout, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, load

MB = 1024 * 1024
ORDER = TaskSpec(uid="task.000001", work=Command("prog"), layout=Layout("process"))


def end_of(folder: Path, printed: bytes, errors: bytes = b"", code: int = 0, most: int | None = None) -> RankOutcome:
    """As after a supervisor has ended."""
    results, path = folder / "results", folder / "p1"
    results.mkdir()
    (folder / "p1.out").write_bytes(printed)
    (folder / "p1.err").write_bytes(errors)
    (folder / "p1.outcome").write_bytes(marshal.dumps(("", "", 42, code, 1.0, 2.0, 0, 0.5, 1000)))
    order = TaskRun(spec=ORDER, bindings={}, results_folder=str(results), attempt=1)
    found = rank_end(str(path), order, 0, most)
    assert found is not None and (found.started, found.ended) == (1.0, 2.0)
    assert sorted(entry.name for entry in folder.iterdir()) == ["results"], "nothing else is left"
    return found.outcome


TEXTS = {
    "short": "  a line\n",
    "empty": " \n",
    "as long as a message": "x" * INLINE_BYTES,
    "long, with characters of four bytes at the ends of pieces": "\n x" + "\U0001f300" * MB + "\n\n",
    "blanks for more than a piece in the middle": "a" + " " * 3 * MB + "b" + "\n" * 2 * MB,
    "nothing but blanks": "\n" * 3 * MB,
    "what JSON escapes": '"\\\n\x01\u2028' * 100_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_value_is_the_text_without_outer_white_space(text: str, tmp_path: Path) -> None:
    value = end_of(tmp_path, text.encode()).value
    assert value is not None and (value.format, value.type) == ("json", "str")
    assert load(value) == text.strip()
    assert value.length == len(text.strip()) and (value.file is None) == (value.size <= INLINE_BYTES)
    assert text.strip().startswith(value.preview)


@pytest.mark.parametrize("copies", [1, 300_000])
def test_what_is_no_utf8_is_bytes(copies: int, tmp_path: Path) -> None:
    printed = b"\xff\x00 a\n" * copies
    value = end_of(tmp_path, printed).value
    assert value is not None and (value.format, value.type, value.length) == ("pickle", "bytes", len(printed))
    assert load(value) == printed
    assert value.preview == f"{len(printed)} bytes that are not UTF-8 text"


def test_of_one_that_is_too_long_the_value_is_what_is_left(tmp_path: Path) -> None:
    outcome = end_of(tmp_path, b"a" * 3 * MB, most=MB)
    assert outcome.value is not None and load(outcome.value) == outcome.stdout.read()
    assert outcome.stdout.left_out == 2 * MB


def test_a_failed_program_tells_its_last_words(tmp_path: Path) -> None:
    outcome = end_of(tmp_path, b"out", errors=b"first\n" * MB + b"the last\n\n", code=3)
    assert (outcome.cause, outcome.error, outcome.value) == (Cause.EXIT_CODE, "exit code 3: the last", None)


def test_of_a_supervisor_that_was_killed_there_is_nothing(tmp_path: Path) -> None:
    order = TaskRun(spec=ORDER, bindings={}, results_folder=str(tmp_path), attempt=1)
    assert rank_end(str(tmp_path / "p1"), order, 0, None) is None
