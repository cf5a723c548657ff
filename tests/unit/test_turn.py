"""Which of the functions that a worker was sent it runs."""

from __future__ import annotations

import threading

from rhapsody_mcp.engine.messages import Interrupt
from rhapsody_mcp.engine.worker import _CurrentTask


def take_back(current_task: _CurrentTask, uid: str) -> bool:
    return current_task.interrupt(Interrupt(uid, running=False), threading.get_ident())


def test_what_was_taken_back_is_not_run() -> None:
    current_task = _CurrentTask()
    assert take_back(current_task, "a")
    assert not current_task.begin("a")
    assert current_task.begin("a")


def test_what_was_sent_again_and_taken_back_again_is_run_neither_time() -> None:
    current_task = _CurrentTask()
    assert take_back(current_task, "a") and take_back(current_task, "a")
    assert not current_task.begin("a") and not current_task.begin("a")
    assert current_task.begin("a")


def test_what_has_begun_is_not_taken_back() -> None:
    current_task = _CurrentTask()
    assert current_task.begin("a")
    assert not take_back(current_task, "a")
