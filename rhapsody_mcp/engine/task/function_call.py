"""Runs one function call in a process for user code, and encodes the result."""

from __future__ import annotations

import _thread
import atexit
import contextvars
import importlib
import inspect
import io
import os
import pickle
import reprlib
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

import cloudpickle
import msgspec

from rhapsody_mcp.engine.isolation import c_streams
from rhapsody_mcp.engine.isolation.sources import Sources
from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.task.error_text import Interrupted, error_line, error_message, missing_module, sendable, trace
from rhapsody_mcp.engine.task.output import end_part, open_part, write_file
from rhapsody_mcp.engine.views.inspection import about, head_of_table, plain_text, type_name
from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.specs import Call, Caps
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import (
    INLINE_BYTES,
    NOTHING,
    PLAIN,
    PREVIEW_CHARS,
    Value,
    holds_code,
    load,
    may_hold_code,
    version_here,
)

__all__ = ["can_start_threads", "encode", "perform"]

_NO_CAPS = Caps()


def perform(
    call: Call, bindings: Mapping[str, Value], folder: str, sources: Sources, caps: Caps = _NO_CAPS
) -> FunctionResult:
    """Run the call, wait for the non-daemon threads that the function started, and return the result. Raises nothing
    but Interrupted.

    The call fails if its result is longer than `caps.result_bytes`. In a process that the function forked, this call
    does not return: the process ends.
    """
    try:
        value = contextvars.copy_context().run(_run, call, bindings, sources)
    except Interrupted:
        raise
    except _CannotLoad as error:
        return FunctionResult(None, Cause.INVALID, f"it cannot start: {error}", error.trace)
    except BaseException as error:
        if _process_flags.is_fork:
            _end_child(error)
        exception = _pickled_exception(error, caps.exception_bytes)
        message = error_message(error) + missing_module(error)
        return FunctionResult(None, Cause.ERROR, message, _trace(call, error, sources), exception)
    if _process_flags.is_fork:
        _end_child(None)
    return _encoded_result(value, folder, caps.result_bytes)


class _ProcessFlags:
    """Flags of this process that last for its lifetime."""

    is_fork = False
    """Whether user code forked this process."""
    has_shut_down_threading = False
    """Whether threading._shutdown was called: afterwards, libraries refuse to start threads."""

    def mark_fork(self) -> None:
        self.is_fork = True


_process_flags = _ProcessFlags()
os.register_at_fork(after_in_child=_process_flags.mark_fork)


def can_start_threads() -> bool:
    """Return False once a function had returned with threads that this process had to wait for."""
    return not _process_flags.has_shut_down_threading


class _CannotLoad(Exception):
    """Raised with the reason if the function or its arguments cannot be loaded."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.trace = trace


def _run(call: Call, bindings: Mapping[str, Value], sources: Sources) -> Any:
    try:
        function = _LOADERS[call.form](call, bindings, sources)
        args, kwargs = _arguments(call, bindings)
    except Interrupted:
        raise
    except BaseException as error:  # unpickling and importing run the user's own code
        raise _CannotLoad(_load_error(call, error, sources), _trace(call, error, sources)) from None
    threads = _thread._count()
    value = function(*args, **kwargs)
    if type(value) not in PLAIN:
        value = _await_result(value)
    if _thread._count() > threads and _has_non_daemon_threads():
        _process_flags.has_shut_down_threading = True
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of a program
    return value


def _load_error(call: Call, error: BaseException, sources: Sources) -> str:
    if isinstance(error, InvalidTask):
        return sendable(str(error))
    line = error_line(error, sources.path_of(call.code)) if call.form == "source" else None
    where = f" (line {line} of the source)" if line else ""
    return f"{error_message(error)}{where}{missing_module(error)}"


def _trace(call: Call, error: BaseException, sources: Sources) -> str:
    """Return the traceback; the name of the function replaces the path of the file that holds the source text."""
    if call.form != "source":
        return trace(error)
    return trace(error).replace(sources.path_of(call.code), f"<source of {call.entry}>")


def _pickled_exception(error: BaseException, max_bytes: int) -> bytes:
    """Return the pickled exception; empty if it cannot be pickled or is longer than `max_bytes`."""
    if not max_bytes:
        return b""
    try:
        pickled = _PickleWriter("", min(max_bytes, INLINE_BYTES))
        cloudpickle.dump(error, pickled)
        return pickled.end()[0] or b""
    except Interrupted:
        raise
    except BaseException:  # _TooLong; a __reduce__ may also raise anything
        return b""


def _await_result(value: Any) -> Any:
    """Await an awaitable in a new event loop, and return its result; return any other value unchanged."""
    if not inspect.isawaitable(value):
        return value
    import asyncio  # here: the import takes as long as all other imports of a worker together

    return asyncio.run(value if inspect.iscoroutine(value) else _coroutine(value))


async def _coroutine(value: Any) -> Any:
    return await value


def _has_non_daemon_threads() -> bool:
    main = threading.main_thread()
    return any(not thread.daemon and thread is not main for thread in threading.enumerate())


def _end_child(error: BaseException | None) -> NoReturn:
    """End a forked process as Python ends a program, with an exit code and a message for the exception."""
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif error is not None:
        code = 1
        lines = [f"{error.code}\n"] if isinstance(error, SystemExit) else traceback.format_exception(error)
        sys.stderr.write("".join(lines))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    c_streams.flush()
    os._exit(code & 0xFF)


def _encoded_result(value: Any, folder: str, max_bytes: int | None) -> FunctionResult:
    try:
        return FunctionResult(encode(value, folder, max_bytes))
    except _TooLong:
        message = (
            f"its return value of type {type_name(value)} takes more than {max_bytes:,} bytes (max_result_bytes in the "
            "settings of the server). Write it into a file and return the file's path, or return a part of it."
        )
        return FunctionResult(None, Cause.ERROR, message, "")
    except Interrupted:
        raise
    except BaseException as error:  # a pickler raises whatever a __reduce__ raises
        message = (
            f"its return value of type {type_name(value)} cannot be sent back: {error_message(error)}. "
            "Return plain data, or write a file and return its path."
        )
        return FunctionResult(None, Cause.ERROR, message, "")


# --- the function and its arguments


def _unpickled(call: Call, bindings: Mapping[str, Value], _: Sources) -> Callable[..., Any]:
    function: Callable[..., Any] = _unpickle(call.code, bindings)
    return function


def _imported(call: Call, _bindings: Mapping[str, Value], _sources: Sources) -> Callable[..., Any]:
    module, _, path = call.code.decode().partition(":")
    if module not in sys.modules:
        importlib.invalidate_caches()  # the module's file may be new
    function: Any = importlib.import_module(module)
    for name in path.split("."):
        try:
            function = getattr(function, name)
        except AttributeError as error:
            raise AttributeError(f"{error}{nearest(name, dir(function))}") from None
    if not callable(function):
        raise InvalidTask(f"{call.code.decode()} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _compiled(call: Call, _: Mapping[str, Value], sources: Sources) -> Callable[..., Any]:
    return getattr(sources.load(call.code), call.entry)  # type: ignore[no-any-return]


_LOADERS = {"pickle": _unpickled, "module": _imported, "source": _compiled}


def _arguments(call: Call, bindings: Mapping[str, Value]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _unpickle(call.arguments, bindings) if call.arguments else ((), {})


def _unpickle(data: bytes, bindings: Mapping[str, Value]) -> Any:
    return _Unpickler(data, bindings).load() if bindings else pickle.loads(data)


class _Unpickler(pickle.Unpickler):
    """Replaces each reference to another task's result by the value."""

    def __init__(self, data: bytes, bindings: Mapping[str, Value]) -> None:
        super().__init__(io.BytesIO(data))
        self._bindings = bindings
        self._values: dict[str, Any] = {}

    def persistent_load(self, reference: tuple[str, str]) -> Any:
        uid, path = reference
        if self._bindings[uid] == NOTHING:
            return None
        if uid not in self._values:
            self._values[uid] = load(self._bindings[uid])
        return resolve_pointer(self._values[uid], path)


# --- the result


class _TooLong(Exception):
    """Raised if a value is longer than the limit."""


_MOST_CODE = 2 * INLINE_BYTES
"""The pickler writes code in pieces of up to 64 KiB, and long data, such as arrays, in a piece of their own."""


class _PickleWriter:
    """A writable file object for a pickle: in memory up to INLINE_BYTES, then in a file of `folder`. Raises _TooLong as
    soon as the pickle is longer than `max_bytes`."""

    def __init__(self, folder: str, max_bytes: int | None) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._memory = io.BytesIO()
        self._file: BinaryIO | None = None
        self.size = 0
        self.may_hold_code = False

    def write(self, data: bytes | memoryview) -> int:
        length = memoryview(data).nbytes
        self.size += length
        if length <= _MOST_CODE and not self.may_hold_code:
            self.may_hold_code = may_hold_code(bytes(data))
        if self._max_bytes is not None and self.size > self._max_bytes:
            raise _TooLong
        if self._file is None and self.size > INLINE_BYTES:
            self._file = open_part(self._folder)
            self._file.write(self._memory.getbuffer())
        return (self._file or self._memory).write(data)

    def end(self) -> tuple[bytes, None] | tuple[None, str]:
        """Return the data, or the path of the file that holds the data."""
        if self._file is None:
            return self._memory.getvalue(), None
        return None, end_part(self._file, ".value")

    def discard(self) -> None:
        """Delete the file, if there is one."""
        if self._file is not None:
            self._file.close()
            os.unlink(self._file.name)


def encode(value: Any, folder: str, max_bytes: int | None = None) -> Value:
    """Encode the value as JSON if JSON keeps it unchanged, else as a pickle. A long encoding is stored in a file of
    `folder`.

    Raises every error of pickling.
    """
    data = _json(value, max_bytes)
    if data is not None:
        if len(data) <= INLINE_BYTES:
            return Value("json", type_name(value), len(data), data, length=_length(value))
        file = write_file(data, folder)
        return Value("json", type_name(value), len(data), None, file, _length(value), _preview(value, data))
    pickled = _PickleWriter(folder, max_bytes)
    try:
        cloudpickle.dump(value, pickled)
        data_in_memory, path = pickled.end()
    except BaseException:
        pickled.discard()
        raise
    return Value(
        "pickle",
        type_name(value),
        pickled.size,
        data_in_memory,
        path,
        _length(value),
        _preview(value, None),
        about(value),
        python=version_here() if pickled.may_hold_code and _holds_code(data_in_memory, path) else "",
    )


def _holds_code(data: bytes | None, path: str | None) -> bool:
    if data is not None:
        return holds_code(data)
    with open(path or "", "rb") as file:
        return holds_code(file)


def _json(value: Any, max_bytes: int | None) -> bytes | None:
    """Return the value as JSON, or None if JSON would change it."""
    try:
        if not _is_plain(value):
            return None
        if max_bytes is not None and type(value) is str and len(value) > max_bytes:
            raise _TooLong
        data = msgspec.json.encode(value)
    except (OverflowError, RecursionError, ValueError, msgspec.MsgspecError):
        return None  # an integer of more than 64 bits, a lone surrogate, a circular reference
    if max_bytes is not None and len(data) > max_bytes:
        raise _TooLong
    return data


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is float:
        return bool(value - value == 0.0)  # neither infinite nor NaN
    if kind is list:
        return all(map(_is_plain, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    return False


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except Interrupted:
        raise
    except BaseException:  # a __len__ may raise anything
        return None


def _preview(value: Any, data: bytes | None) -> str:
    if data is not None:
        return data[:PREVIEW_CHARS].decode("utf-8", "ignore")
    if isinstance(value, bytes | bytearray):
        return about(value) or f"binary, {len(value)} bytes"
    try:
        if plain := head_of_table(value, _PLAIN_PREVIEW_BYTES) or plain_text(value, _PLAIN_PREVIEW_BYTES):
            return plain
        summary = "" if about(value) else _array_summary(value)
        return sendable(f"{summary}{_REPR.repr(value)}"[:PREVIEW_CHARS])
    except Interrupted:
        raise
    except BaseException:  # a __repr__, or a method of a dict's subclass, may raise anything
        return ""


def _array_summary(value: Any) -> str:
    """Describe an array, tensor or table, as in `shape (2, 3), dtype float64, 48 bytes: `; empty for other values."""
    shape, dtype, size = (getattr(value, name, None) for name in ("shape", "dtype", "nbytes"))
    facts = [f"shape {tuple(shape)}"] if isinstance(shape, Sequence) else []
    facts += [f"dtype {dtype}"] if facts and dtype is not None else []
    facts += [f"{size} bytes"] if facts and isinstance(size, int) else []
    return f"{', '.join(facts)}: " if facts else ""


_PLAIN_PREVIEW_BYTES = 2048
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = _REPR.maxlong = PREVIEW_CHARS
_REPR.maxtuple = _REPR.maxlist = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 20
_REPR.maxlevel = 3
