"""Text for an exception of user code: of bounded length, and valid UTF-8."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import TracebackType

from rhapsody_mcp.model.values import PREVIEW_CHARS

__all__ = ["Interrupted", "bounded", "error_line", "error_message", "missing_module", "sendable", "trace"]

_PACKAGE_PREFIX = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_IMPORT_FRAMES = ("<frozen importlib", importlib.__file__)
_MESSAGE_CHARS = 2000


class Interrupted(BaseException):
    """Raised in a function when its task is canceled or its time limit is reached."""


def error_message(error: BaseException) -> str:
    """Return the type and the message of an exception, at most 2000 characters."""
    try:
        message = str(error)
    except Interrupted:
        raise
    except BaseException as failure:  # a __str__ may raise anything
        message = f"(what it says cannot be shown: its __str__ raised {type(failure).__name__})"
    kind = sendable(type(error).__name__)
    return bounded(f"{kind}: {message}" if message else kind, _MESSAGE_CHARS)


def missing_module(error: BaseException) -> str:
    """A sentence on how to get a module that is missing here; empty for another error."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return (
        f". It ran in {sys.executable}; what it lacks comes with packages of the task, with python (an environment "
        "that has it), or with setup (as in module load)"
    )


def trace(error: BaseException) -> str:
    """Return the traceback as text, without the leading frames of this package and of the import system."""
    try:
        lines = traceback.format_exception(type(error), error, _user_frames(error.__traceback__))
    except Interrupted:
        raise
    except BaseException:  # an attribute of the user's exception class may raise anything
        lines = [error_message(error)]
    return bounded("".join(lines), PREVIEW_CHARS)


def error_line(error: BaseException, path: str) -> int | None:
    """Return the last line of the file `path` that was running when the exception was raised; None if there is none."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    return lines[-1] if lines else None


def _user_frames(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((_PACKAGE_PREFIX, *_IMPORT_FRAMES)):
        frames = frames.tb_next
    return frames


def bounded(text: str, max_chars: int) -> str:
    """Return the text as valid UTF-8; of a longer text, the first and the last `max_chars // 2` characters."""
    if len(text) > max_chars:
        left_out = len(text) - max_chars
        text = f"{text[: max_chars // 2]} [... {left_out} characters left out ...] {text[len(text) - max_chars // 2 :]}"
    return sendable(text)


def sendable(text: str) -> str:
    """Replace lone surrogates by escapes: a file name that is not UTF-8 contains them."""
    return text.encode("utf-8", "backslashreplace").decode()
