"""What is done where Dragon does not answer."""

from __future__ import annotations

import threading

import pytest

from rhapsody_mcp.engine.node.timeouts import call_with_timeouts


def test_what_comes_in_time_is_taken() -> None:
    assert call_with_timeouts(lambda: "done", (30.0,), undo=lambda _: None) == "done"


def test_what_hangs_is_tried_again_and_undone_when_it_comes_after_all() -> None:
    hangs, undone, calls = threading.Event(), threading.Event(), list[int]()
    undone_what: list[int] = []

    def work() -> int:
        calls.append(len(calls))
        number = calls[-1]
        if number == 0:
            hangs.wait()
        return number

    def undo(number: int) -> None:
        undone_what.append(number)
        undone.set()

    assert call_with_timeouts(work, (1.0, 30.0), undo=undo) == 1
    assert not undone_what
    hangs.set()
    assert undone.wait(30)
    assert undone_what == [0]


def test_what_always_hangs_is_given_up_in_words() -> None:
    hangs = threading.Event()
    with pytest.raises(TimeoutError, match=r"no end of it within 0\.01 s, and again within 0\.02 s"):
        call_with_timeouts(hangs.wait, (0.01, 0.02), undo=lambda _: None)
    hangs.set()


def test_an_error_is_passed_on_at_once() -> None:
    def work() -> int:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        call_with_timeouts(work, (30.0, 30.0), undo=lambda _: None)
