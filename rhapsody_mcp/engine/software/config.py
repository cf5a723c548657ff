"""The configuration of a rank as a file that any Python reads: a pickle of plain values."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["read_config", "write_config"]

_PROTOCOL = 4


class _Pickler(pickle.Pickler):
    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, msgspec.Struct):
            fields = {name: getattr(item, name) for name in item.__struct_fields__}
            return _rebuilt, (type(item), fields)
        return NotImplemented


def _rebuilt(kind: type[Any], fields: dict[str, Any]) -> Any:
    return kind(**fields)


def write_config(path: str, config: msgspec.Struct) -> None:
    """Write the configuration; the bytes in it, which may be pickles of the user, stay bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, _PROTOCOL).dump(config)
    Path(path).write_bytes(buffer.getvalue())


def read_config(path: str) -> Any:
    """Read the configuration that `write_config` has written, and delete the file."""
    data = Path(path).read_bytes()
    Path(path).unlink()
    return pickle.loads(data)
