"""What an exception of user code says, as text that is bounded and can be sent."""

from __future__ import annotations

import importlib
import os
import traceback
from types import TracebackType

from rhapsody_mcp.model.values import PREVIEW_CHARS

__all__ = ["Interrupted", "bounded", "line_in", "sendable", "trace", "words"]

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IMPORTING = ("<frozen importlib", importlib.__file__)
_WORDS_CHARS = 2000


class Interrupted(BaseException):
    """Raised inside a function that is canceled or whose time is up."""


def words(error: BaseException) -> str:
    """Its type and what it says."""
    try:
        said = str(error)
    except Interrupted:
        raise
    except BaseException as failure:  # a __str__ may raise anything
        said = f"(what it says cannot be shown: its __str__ raised {type(failure).__name__})"
    kind = sendable(type(error).__name__)
    return bounded(f"{kind}: {said}" if said else kind, _WORDS_CHARS)


def trace(error: BaseException) -> str:
    """Its traceback, without the frames of this package that lead to the user's code."""
    try:
        lines = traceback.format_exception(type(error), error, _of_the_user(error.__traceback__))
    except Interrupted:
        raise
    except BaseException:  # an exception of the user's own kind may raise anything when it is looked at
        lines = [words(error)]
    return bounded("".join(lines), PREVIEW_CHARS)


def line_in(error: BaseException, path: str) -> int | None:
    """The last line of this file that was running when it was raised."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    return lines[-1] if lines else None


def _of_the_user(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((_OURS, *_IMPORTING)):
        frames = frames.tb_next
    return frames


def bounded(text: str, most: int) -> str:
    """The text as it can be sent; of a longer one, its beginning and its end."""
    if len(text) > most:
        left_out = len(text) - most
        text = f"{text[: most // 2]} [... {left_out} characters left out ...] {text[len(text) - most // 2 :]}"
    return sendable(text)


def sendable(text: str) -> str:
    """With escapes for half characters, as in the name of a file that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
