"""Runs one function call where user code may run, and encodes what came of it."""

from __future__ import annotations

import importlib
import inspect
import io
import linecache
import os
import pickle
import reprlib
import traceback
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import cloudpickle
import msgspec

from rhapsody_mcp.engine.output import end_part, open_part, write_file
from rhapsody_mcp.engine.reading import plain_text, type_name
from rhapsody_mcp.engine.wire import Result
from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.specs import Call
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, PREVIEW_CHARS, Value, follow, load

if TYPE_CHECKING:
    import asyncio

__all__ = ["Loop", "encode", "perform"]


def perform(call: Call, bindings: Mapping[str, Value], folder: str, loop: Loop, most: int | None = None) -> Result:
    """Run the call to its end; a coroutine function in `loop`. Only BaseExceptions that are no Exception, and
    no SystemExit, leave it. A result of more than `most` bytes makes it fail."""
    try:
        function = _function(call)
        args, kwargs = _arguments(call, bindings)
    except Exception as error:  # unpickling and importing run the user's own code
        told = str(error) if isinstance(error, InvalidTask) else _words(error)
        return Result(None, Cause.INVALID, f"it cannot start: {told}", _trace(error))
    try:
        value = function(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = loop.run(value)
        elif inspect.isawaitable(value):
            value = loop.run(_awaited(value))
    except (Exception, SystemExit) as error:
        return Result(None, Cause.ERROR, _words(error), _trace(error))
    return _encoded(value, folder, most)


async def _awaited(value: Any) -> Any:
    return await value


class Loop:
    """The event loop of coroutine functions, made when the first one comes: asyncio takes as long to import as all else
    that a worker needs."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)


def _encoded(value: Any, folder: str, most: int | None) -> Result:
    try:
        return Result(encode(value, folder, most))
    except _TooLong:
        message = (
            f"its return value of type {type_name(value)} takes more than {most:,} bytes (max_result_bytes in the "
            "settings of the server). Write it into a file and return the file's path, or return a part of it."
        )
        return Result(None, Cause.ERROR, message, "")
    except Exception as error:  # a pickler raises whatever a __reduce__ raises
        message = (
            f"its return value of type {type_name(value)} cannot be sent back: {_words(error)}. "
            "Return plain data, or write a file and return its path."
        )
        return Result(None, Cause.ERROR, message, "")


# --- the function and its arguments

_functions: OrderedDict[tuple[str, bytes, str], Callable[..., Any]] = OrderedDict()
_KEPT_FUNCTIONS = 256


def _function(call: Call) -> Callable[..., Any]:
    key = (call.form, call.code, call.entry)
    if key not in _functions:
        _functions[key] = _LOADERS[call.form](call)
        if len(_functions) > _KEPT_FUNCTIONS:
            _functions.popitem(last=False)
    return _functions[key]


def _unpickled(call: Call) -> Callable[..., Any]:
    function: Callable[..., Any] = pickle.loads(call.code)
    return function


def _imported(call: Call) -> Callable[..., Any]:
    module, _, path = call.code.decode().partition(":")
    function: Any = importlib.import_module(module)
    for name in path.split("."):
        try:
            function = getattr(function, name)
        except AttributeError as error:
            raise AttributeError(f"{error}{nearest(name, dir(function))}") from None
    if not callable(function):
        raise InvalidTask(f"{call.code.decode()} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _compiled(call: Call) -> Callable[..., Any]:
    text = call.code.decode()
    filename = f"<source of {call.entry}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "__rhapsody_source__"}
    exec(compile(text, filename, "exec", dont_inherit=True), namespace)
    return namespace[call.entry]  # type: ignore[no-any-return]


_LOADERS = {"pickle": _unpickled, "module": _imported, "source": _compiled}


def _arguments(call: Call, bindings: Mapping[str, Value]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not call.arguments:
        return (), {}
    if not bindings:
        return pickle.loads(call.arguments)  # type: ignore[no-any-return]
    args, kwargs = _Unpickler(call.arguments, bindings).load()
    return args, kwargs


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
        return follow(self._values[uid], path)


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
    except (OverflowError, RecursionError, UnicodeEncodeError, msgspec.MsgspecError):
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
    except Exception:  # a __len__ may raise anything
        return None


def _preview(value: Any, data: bytes | None) -> str:
    if data is not None:
        return data[:PREVIEW_CHARS].decode("utf-8", "ignore")
    if isinstance(value, bytes | bytearray):
        return f"binary, {len(value)} bytes"
    try:
        if plain := plain_text(value, _PLAIN_BYTES):
            return plain
        return f"{_form(value)}{_REPR.repr(value)}"[:PREVIEW_CHARS]
    except Exception:  # a __repr__, or a dict of its own kind, may raise anything
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


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _trace(error: BaseException) -> str:
    """The traceback without the frame of this module."""
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, frames))[-PREVIEW_CHARS:]
