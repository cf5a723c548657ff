"""Stands for msgspec while this package is imported in a Python of the user, which has the standard library alone.

It has as much of msgspec as a rank uses: plain values with fields, and JSON. Python 3.10 can read it.
"""

from __future__ import annotations

import json as _json
from base64 import b64encode
from types import SimpleNamespace
from typing import Any

__all__ = ["UNSET", "DecodeError", "MsgspecError", "Struct", "ValidationError", "json", "structs", "to_builtins"]

UNSET = object()
_LEAST_INT, _MOST_INT = -(2**63), 2**64 - 1


class MsgspecError(Exception):
    """The base of all errors here."""


class ValidationError(MsgspecError):
    """Never raised here."""


class DecodeError(MsgspecError):
    """Raised for a text that is no JSON."""


class Struct:
    """A value with the fields that its class annotates."""

    __struct_fields__: tuple[str, ...] = ()

    def __init_subclass__(cls, **_options: object) -> None:
        own = [name for name, kind in vars(cls).get("__annotations__", {}).items() if not kind.startswith("ClassVar")]
        cls.__struct_fields__ = tuple(dict.fromkeys([*cls.__struct_fields__, *own]))

    def __init__(self, *values: Any, **fields: Any) -> None:
        given = {**dict(zip(self.__struct_fields__, values, strict=False)), **fields}
        for name in self.__struct_fields__:
            if name not in given and not hasattr(type(self), name):
                raise TypeError(f"Missing required argument {name!r}")
            vars(self)[name] = given[name] if name in given else _default(type(self), name)
        if callable(check := getattr(self, "__post_init__", None)):
            check()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _default(kind: type[Struct], name: str) -> Any:
    value = getattr(kind, name)
    return value.copy() if isinstance(value, dict | list) else value


def _asdict(struct: Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _replace(struct: Struct, **changes: Any) -> Any:
    return type(struct)(**{**_asdict(struct), **changes})


def to_builtins(value: Any) -> Any:
    """The value as plain data; bytes as base64."""
    if isinstance(value, Struct):
        return {name: to_builtins(part) for name, part in _asdict(value).items()}
    if isinstance(value, dict):
        return {key: to_builtins(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtins(part) for part in value]
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, int) and not _LEAST_INT <= value <= _MOST_INT:
        raise OverflowError("can't serialize ints > 64 bits")
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def _encode(value: Any) -> bytes:
    """Raises what msgspec raises: OverflowError, and ValueError for a lone surrogate."""
    return _json.dumps(to_builtins(value), ensure_ascii=False, separators=(",", ":")).encode()


def _decode(data: bytes | str, type: type[Any] | None = None) -> Any:
    """With a `type`, the fields of a struct that holds no other."""
    try:
        value = _json.loads(data)
        return value if type is None else type(**value)
    except ValueError as error:
        raise DecodeError(f"JSON is malformed: {error}") from error


json = SimpleNamespace(encode=_encode, decode=_decode)
structs = SimpleNamespace(asdict=_asdict, replace=_replace)
