"""Encodes functions and their arguments for a backend."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cloudpickle
import msgspec

from rhapsody_mcp.model.errors import InvalidTask, nearest
from rhapsody_mcp.model.specs import Call
from rhapsody_mcp.model.values import PLAIN, Ref

__all__ = ["Encoder", "Module", "Source", "are_plain"]

_MAX_CHARS = 32 * 1024


class Module(msgspec.Struct, frozen=True):
    """A function by its import path, "module:function". The worker imports the module; this process never does."""

    path: str

    def __post_init__(self) -> None:
        module, _, function = self.path.partition(":")
        if not all(name.isidentifier() for name in (*module.split("."), *function.split("."))):
            raise InvalidTask(
                f'{self.path!r} is no import path; write it as "package.module:function".', field="function"
            )


class Source(msgspec.Struct, frozen=True):
    """A function as source text. `entry` is the name of the function; without a name, the last function is used.

    A fence of ``` around the whole text is removed.

    Raises InvalidTask where the text does not compile (with line and message), is too long to compile in the event
    loop of the service, or has no function of this name.
    """

    text: str
    entry: str = ""

    def __post_init__(self) -> None:
        if len(self.text) > _MAX_CHARS:
            raise InvalidTask(
                f"the source has {len(self.text):,} characters; {_MAX_CHARS:,} is the most. Write it to a file in "
                "the session's folder and import it as a module, and pass data in args."
            )
        msgspec.structs.force_setattr(self, "text", _without_fence(self.text))
        functions = self._functions()
        if not functions:
            raise InvalidTask("the source defines no function at its top level; write one with def.", field="source")
        if self.entry and self.entry not in functions:
            near = nearest(self.entry, functions)
            raise InvalidTask(
                f"the source has no function {self.entry!r}{near}. It has: {', '.join(functions)}.", field="entry"
            )

    @property
    def function_name(self) -> str:
        return self.entry or list(self._functions())[-1]

    @property
    def signature(self) -> str:
        """As in the source, for example `add(a, b=2) -> int`."""
        definition = self._functions()[self.function_name]
        kind = "async " if isinstance(definition, ast.AsyncFunctionDef) else ""
        returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
        return f"{kind}{definition.name}({ast.unparse(definition.args)}){returns}"

    @property
    def docstring(self) -> str:
        """Empty for a function without a docstring."""
        return ast.get_docstring(self._functions()[self.function_name]) or ""

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidTask where the function does not take these arguments."""
        definition = self._functions()[self.function_name]
        if definition.decorator_list:
            return  # a decorator may change the signature
        try:
            _signature(definition.args).bind(*args, **kwargs)
        except TypeError as error:
            written = ast.unparse(definition.args)
            raise InvalidTask(
                f"{definition.name}({written}) does not take these arguments: {error}.", field="args"
            ) from None

    def _functions(self) -> Mapping[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        return _functions_in(self.text)


def _without_fence(text: str) -> str:
    head, line_end, rest = text.strip().partition("\n")
    if not (line_end and re.fullmatch(r"```[ \t]*\w*[ \t\r]*", head) and rest.endswith("```")):
        return text
    return rest.removesuffix("```").rstrip(" \t").removesuffix("\n")


@functools.lru_cache(maxsize=64)
def _functions_in(text: str) -> Mapping[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        tree = ast.parse(text)
        compile(tree, "<source>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        shown = f" in {error.text.strip()!r}" if isinstance(error, SyntaxError) and error.text else ""
        raise InvalidTask(f"the source does not compile: {line}{message}{shown}.", field="source") from None
    except (MemoryError, RecursionError):
        raise InvalidTask(
            "the source does not compile: an expression in it is nested too deeply.", field="source"
        ) from None
    definitions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: node for node in definitions}


class Encoder:
    """Encodes the calls of one submission. A function that several tasks share is encoded once.

    `reference` returns the Ref of an object that stands for a result, and None for other objects. `referring_objects`
    are the objects with a Ref that the last call holds, in its arguments or in the closure of its function.
    """

    def __init__(self, reference: Callable[[object], Ref | None]) -> None:
        self._reference = reference
        self._pickled: dict[int, tuple[Callable[..., Any], bytes, list[Any]]] = {}
        self._texts: dict[str, bytes] = {}
        self.referring_objects: list[Any] = []

    def call(
        self,
        function: Callable[..., Any] | Source | Module,
        args: Sequence[Any],
        kwargs: object,
        outputs: tuple[str, ...] = (),
    ) -> Call:
        self.referring_objects = []
        arguments = self._arguments(tuple(args), kwargs) if args or kwargs else b""
        if isinstance(function, Source):
            text = self._texts.setdefault(function.text, function.text.encode())
            return Call("source", text, function.function_name, arguments, outputs)
        if isinstance(function, Module):
            return Call("module", function.path.encode(), "", arguments, outputs)
        return Call("pickle", self._function(function), getattr(function, "__name__", ""), arguments, outputs)

    def _arguments(self, args: tuple[Any, ...], kwargs: object) -> bytes:
        if not kwargs and are_plain(args):
            return pickle.dumps((args, kwargs))
        return self._pickle((args, kwargs), "the arguments", self.referring_objects)

    def _function(self, function: Callable[..., Any]) -> bytes:
        if id(function) not in self._pickled:
            referring: list[Any] = []
            self._pickled[id(function)] = (function, self._pickle(function, "the function", referring), referring)
        _, data, referring = self._pickled[id(function)]
        self.referring_objects += referring
        return data

    def _pickle(self, value: object, what: str, referring: list[Any]) -> bytes:
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self._reference, referring).dump(value)
        except Exception as error:  # a __reduce__ may raise any exception
            raise InvalidTask(
                f"{what} cannot be sent to another process: {type(error).__name__}: {error}. "
                "Open files, locks and connections inside the function, and pass plain data."
            ) from error
        return buffer.getvalue()


def are_plain(args: Iterable[object]) -> bool:
    """Whether plain pickle can encode the arguments: no references, and nothing that only cloudpickle handles."""
    return PLAIN.issuperset(map(type, args))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def __init__(self, buffer: io.BytesIO, reference: Callable[[object], Ref | None], referring: list[Any]) -> None:
        super().__init__(buffer)
        self._reference, self._referring = reference, referring

    def persistent_id(self, item: object) -> tuple[str, str] | None:
        ref = self._reference(item)
        if ref is None:
            return None
        self._referring.append(item)
        return ref.uid, ref.path

    def reducer_override(self, item: Any) -> Any:
        """Send a cached function of __main__ with an empty cache. Cloudpickle alone would send an import path."""
        if isinstance(item, functools._lru_cache_wrapper) and item.__module__ == "__main__":
            limits = item.cache_parameters()
            arguments = (item.__wrapped__, limits["maxsize"], limits["typed"], _CACHE_INFO)
            return functools._lru_cache_wrapper, arguments, vars(item)
        return super().reducer_override(item)


_CACHE_INFO = functools._CacheInfo


def _signature(arguments: ast.arguments) -> inspect.Signature:
    """The signature of a definition. Each default is None."""
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    parameters = []
    for index, argument in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        default = kinds.empty if index < without_default else None
        parameters.append(inspect.Parameter(argument.arg, kind, default=default))
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = kinds.empty if value is None else None
        parameters.append(inspect.Parameter(argument.arg, kinds.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)
