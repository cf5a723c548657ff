"""Runs one function call where user code may run, and encodes what came of it."""

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
from rhapsody_mcp.engine.task.error_text import Interrupted, line_in, sendable, trace, words
from rhapsody_mcp.engine.task.inspection import plain_text, type_name
from rhapsody_mcp.engine.task.output import end_part, open_part, write_file
from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.specs import Call, Caps
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, PLAIN, PREVIEW_CHARS, Value, load

__all__ = ["can_start_threads", "encode", "perform"]

_NO_CAPS = Caps()


def perform(
    call: Call, bindings: Mapping[str, Value], folder: str, sources: Sources, caps: Caps = _NO_CAPS
) -> FunctionResult:
    """Run the call to its end, with the threads that it leaves which are no daemons. Only Interrupted leaves it.

    A result that is longer than it may be makes it fail. A process that the function forks ends where it comes back.
    """
    try:
        value = contextvars.copy_context().run(_run, call, bindings, sources)
    except Interrupted:
        raise
    except _CannotStart as error:
        return FunctionResult(None, Cause.INVALID, f"it cannot start: {error}", error.trace)
    except BaseException as error:
        if _process.is_child:
            _end_child(error)
        exception = _pickled(error, caps.exception_bytes)
        return FunctionResult(None, Cause.ERROR, words(error), _trace(call, error, sources), exception)
    if _process.is_child:
        _end_child(None)
    return _encoded(value, folder, caps.result_bytes)


class _Process:
    """What became of this process."""

    is_child = False
    """Whether user code has forked it."""
    has_joined = False
    """Whether it has waited for threads as at its end: libraries that start threads refuse to from then on."""

    def note_fork(self) -> None:
        self.is_child = True


_process = _Process()
os.register_at_fork(after_in_child=_process.note_fork)


def can_start_threads() -> bool:
    """False once a function was waited for whose threads had not ended."""
    return not _process.has_joined


class _CannotStart(Exception):
    """Raised with the reason where the function, or its arguments, cannot be had."""

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
        raise _CannotStart(_why_not(call, error, sources), _trace(call, error, sources)) from None
    threads = _thread._count()
    value = function(*args, **kwargs)
    if type(value) not in PLAIN:
        value = _awaited(value)
    if _thread._count() > threads and _has_threads_to_wait_for():
        _process.has_joined = True
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of a program
    return value


def _why_not(call: Call, error: BaseException, sources: Sources) -> str:
    if isinstance(error, InvalidTask):
        return sendable(str(error))
    line = line_in(error, sources.path_of(call.code)) if call.form == "source" else None
    return f"{words(error)} (line {line} of the source)" if line else words(error)


def _trace(call: Call, error: BaseException, sources: Sources) -> str:
    """With a name in the place of the file that a source text has."""
    if call.form != "source":
        return trace(error)
    return trace(error).replace(sources.path_of(call.code), f"<source of {call.entry}>")


def _pickled(error: BaseException, most: int) -> bytes:
    """Empty where it cannot be sent."""
    if not most:
        return b""
    try:
        pickled = _Pickled("", min(most, INLINE_BYTES))
        cloudpickle.dump(error, pickled)
        return pickled.end()[0] or b""
    except Interrupted:
        raise
    except BaseException:  # _TooLong, and a __reduce__ may raise anything
        return b""


def _awaited(value: Any) -> Any:
    """What a coroutine gives, in an event loop of its own; any other value as it is."""
    if not inspect.isawaitable(value):
        return value
    import asyncio  # which takes as long as all else that a worker imports

    return asyncio.run(value if inspect.iscoroutine(value) else _await(value))


async def _await(value: Any) -> Any:
    return await value


def _has_threads_to_wait_for() -> bool:
    main = threading.main_thread()
    return any(not thread.daemon and thread is not main for thread in threading.enumerate())


def _end_child(error: BaseException | None) -> NoReturn:
    """As a program ends whose last words these are."""
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif error is not None:
        code = 1
        said = [f"{error.code}\n"] if isinstance(error, SystemExit) else traceback.format_exception(error)
        sys.stderr.write("".join(said))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    c_streams.flush()
    os._exit(code & 0xFF)


def _encoded(value: Any, folder: str, most: int | None) -> FunctionResult:
    try:
        return FunctionResult(encode(value, folder, most))
    except _TooLong:
        message = (
            f"its return value of type {type_name(value)} takes more than {most:,} bytes (max_result_bytes in the "
            "settings of the server). Write it into a file and return the file's path, or return a part of it."
        )
        return FunctionResult(None, Cause.ERROR, message, "")
    except Interrupted:
        raise
    except BaseException as error:  # a pickler raises whatever a __reduce__ raises
        message = (
            f"its return value of type {type_name(value)} cannot be sent back: {words(error)}. "
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
        importlib.invalidate_caches()  # its file may be new
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
    """Puts the values of other tasks where the references to them stand."""

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
    """Raised where a value is longer than it may be."""


class _Pickled:
    """Takes a pickle: in memory while that is short, then in a file of `folder`. It takes `most` bytes and no more: a
    longer one is not made at all."""

    def __init__(self, folder: str, most: int | None) -> None:
        self._folder, self._most = folder, most
        self._memory = io.BytesIO()
        self._file: BinaryIO | None = None
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        length = memoryview(data).nbytes
        self.size += length
        if self._most is not None and self.size > self._most:
            raise _TooLong
        if self._file is None and self.size > INLINE_BYTES:
            self._file = open_part(self._folder)
            self._file.write(self._memory.getbuffer())
        return (self._file or self._memory).write(data)

    def end(self) -> tuple[bytes, None] | tuple[None, str]:
        """The data, or the file that has it."""
        if self._file is None:
            return self._memory.getvalue(), None
        return None, end_part(self._file, ".value")

    def give_up(self) -> None:
        if self._file is not None:
            self._file.close()
            os.unlink(self._file.name)


def encode(value: Any, folder: str, most: int | None = None) -> Value:
    """The value as JSON if that gives it back exactly, else as a pickle; in a file of `folder` where it is long.

    Raises whatever pickling raises.
    """
    data = _json(value, most)
    if data is not None:
        if len(data) <= INLINE_BYTES:
            return Value("json", type_name(value), len(data), data, length=_length(value))
        file = write_file(data, folder)
        return Value("json", type_name(value), len(data), None, file, _length(value), _preview(value, data))
    pickled = _Pickled(folder, most)
    try:
        cloudpickle.dump(value, pickled)
        short, long = pickled.end()
    except BaseException:
        pickled.give_up()
        raise
    return Value("pickle", type_name(value), pickled.size, short, long, _length(value), _preview(value, None))


def _json(value: Any, most: int | None) -> bytes | None:
    """The value as JSON, or None where JSON would change it."""
    try:
        if not _is_plain(value):
            return None
        if most is not None and type(value) is str and len(value) > most:
            raise _TooLong
        data = msgspec.json.encode(value)
    except (OverflowError, RecursionError, ValueError, msgspec.MsgspecError):
        return None  # whole numbers of more than 64 bits, half a surrogate pair, circles
    if most is not None and len(data) > most:
        raise _TooLong
    return data


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return True
    if kind is float:
        return bool(value - value == 0.0)  # neither infinite nor not-a-number
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
        return f"binary, {len(value)} bytes"
    try:
        if plain := plain_text(value, _PLAIN_BYTES):
            return plain
        return sendable(f"{_form(value)}{_REPR.repr(value)}"[:PREVIEW_CHARS])
    except Interrupted:
        raise
    except BaseException:  # a __repr__, or a dict of its own kind, may raise anything
        return ""


def _form(value: Any) -> str:
    """What arrays, tensors and tables say of themselves, as in `shape (2, 3), dtype float64, 48 bytes: `."""
    shape, dtype, size = (getattr(value, name, None) for name in ("shape", "dtype", "nbytes"))
    facts = [f"shape {tuple(shape)}"] if isinstance(shape, Sequence) else []
    facts += [f"dtype {dtype}"] if facts and dtype is not None else []
    facts += [f"{size} bytes"] if facts and isinstance(size, int) else []
    return f"{', '.join(facts)}: " if facts else ""


_PLAIN_BYTES = 2048
_REPR = reprlib.Repr()
_REPR.maxother = _REPR.maxstring = _REPR.maxlong = PREVIEW_CHARS
_REPR.maxtuple = _REPR.maxlist = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 20
_REPR.maxlevel = 3
