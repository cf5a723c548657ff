"""Which of the functions that a worker was sent it runs."""

from __future__ import annotations

import threading

from rhapsody_mcp.engine.messages import Interrupt
from rhapsody_mcp.engine.worker import _Turn


def take_back(turn: _Turn, uid: str) -> bool:
    return turn.interrupt(Interrupt(uid, running=False), threading.get_ident())


def test_what_was_taken_back_is_not_run() -> None:
    turn = _Turn()
    assert take_back(turn, "a")
    assert not turn.begin("a")
    assert turn.begin("a")


def test_what_was_sent_again_and_taken_back_again_is_run_neither_time() -> None:
    turn = _Turn()
    assert take_back(turn, "a") and take_back(turn, "a")
    assert not turn.begin("a") and not turn.begin("a")
    assert turn.begin("a")


def test_what_has_begun_is_not_taken_back() -> None:
    turn = _Turn()
    assert turn.begin("a")
    assert not take_back(turn, "a")
