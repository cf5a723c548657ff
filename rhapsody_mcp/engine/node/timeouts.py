"""Gives up a call that hangs, and makes it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

__all__ = ["call_with_timeouts"]

T = TypeVar("T")


def call_with_timeouts(work: Callable[[], T], timeouts_s: Sequence[float], undo: Callable[[T], None]) -> T:
    """Call `work` once for each timeout, in seconds, until a call returns in time; return its result. A call that
    returns too late is undone with `undo`.

    Raises the exception of a call that fails in time, and TimeoutError if no call returns in time.
    """
    for timeout_s in timeouts_s:
        answer: Future[T] = Future()
        threading.Thread(target=_answer, args=(work, answer), daemon=True).start()
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            if answer.done():
                return answer.result()  # `work` ended at the last moment, or raised TimeoutError itself
            answer.add_done_callback(lambda late: None if late.exception() else undo(late.result()))
    raise TimeoutError(
        f"no end of it within {' s, and again within '.join(f'{timeout_s:g}' for timeout_s in timeouts_s)} s"
    )


def _answer(work: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(work())
    except Exception as error:  # raised again where the result is awaited
        answer.set_exception(error)
