"""Starts a rank in a Python of the user, which has the standard library alone.

What a rank needs besides is brought along: cloudpickle and this package, in a folder of the engine that stands at the
end of `sys.path`. Ours come first only while this module runs, so that a rank never runs a mix of two versions.
"""

from __future__ import annotations

import enum
import os
import sys
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

__all__ = ["bring_along", "command", "main"]

_BROUGHT = ("cloudpickle", "rhapsody_mcp")
_STAND_IN = str(Path(__file__).parent / "stand_in")


def bring_along(folder: str) -> str:
    """Make the folder of what is brought along, in the folder of an engine, and return its path."""
    brought = Path(folder, "brought")
    brought.mkdir(exist_ok=True)
    for name in _BROUGHT:
        link = brought / name
        if not link.is_symlink():
            link.symlink_to(package_folder(name))
    return str(brought)


def package_folder(name: str) -> str:
    """The folder of a package of this Python."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return os.path.dirname(os.path.realpath(spec.origin))


def command(python: str, brought: str, config: str) -> list[str]:
    """The command that runs a rank with this configuration."""
    boot = (
        f"import sys; sys.path[:] = [{brought!r}, *filter(None, sys.path)]; "
        "from rhapsody_mcp.engine.software.start import main; main()"
    )
    return [python, "-c", boot, config]


def main() -> NoReturn:
    brought = sys.path.pop(0)
    sys.path[:0] = [_STAND_IN, brought]
    missing = [(module, name) for module, name in _LATER_NAMES if not hasattr(module, name)]
    for module, name in missing:
        setattr(module, name, _LATER_NAMES[module, name])
    from rhapsody_mcp.engine import rank

    config = rank.read_config(sys.argv[1])
    for module, name in missing:
        delattr(module, name)
    del sys.path[:2]
    sys.path.append(brought)
    sys.modules.pop("msgspec")  # the user's own, from now on
    rank.run(sys.argv[1], config)


class _StrEnum(str, enum.Enum):  # noqa: UP042
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]


_LATER_NAMES = {(enum, "StrEnum"): _StrEnum, (typing, "Self"): typing.Any}
"""What Python 3.10 lacks, and what this package imports by these names."""
