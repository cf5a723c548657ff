"""Starts a rank in a Python of the user, which has the standard library alone.

What a rank needs besides is brought along: cloudpickle and this package, in a folder of the engine that stands at the
end of `sys.path`. Ours come first only while this module runs, so that a rank never runs a mix of two versions.
"""

from __future__ import annotations

import enum
import os
import sys
import typing
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

__all__ = ["bring_along", "brought_folders", "command", "main"]

_BROUGHT = ("cloudpickle", "rhapsody_mcp")
_STAND_IN = str(Path(__file__).parent / "stand_in")


def bring_along(folder: str) -> str:
    """Make the folder of what is brought along, in the folder of an engine, and return its path."""
    brought = Path(folder, "brought")
    brought.mkdir(exist_ok=True)
    for name in _BROUGHT:
        with suppress(FileExistsError):
            (brought / name).symlink_to(_package_folder(name))
    return str(brought)


def brought_folders() -> list[str]:
    """The folders that the folder of what is brought along has links to."""
    return list(map(_package_folder, _BROUGHT))


def _package_folder(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return os.path.dirname(os.path.realpath(spec.origin))


def command(python: str, brought: str, config: str) -> list[str]:
    """The command that runs a rank with this configuration."""
    boot = (
        "import sys; sys.version_info >= (3, 10) or sys.exit(f'Python {sys.version} is older than 3.10'); "
        f"sys.path[:] = [{brought!r}, *filter(None, sys.path)]; "
        "from rhapsody_mcp.engine.software.start import main; main()"
    )
    return [python, "-c", boot, config]


def main() -> NoReturn:
    brought = sys.path.pop(0)
    sys.path[:0] = [_STAND_IN, brought]
    missing = [(module, name) for module, name in _LATER_NAMES if not hasattr(module, name)]
    for module, name in missing:
        setattr(module, name, _LATER_NAMES[module, name])
    _do_without_ctypes()
    from rhapsody_mcp.engine import rank

    config = rank.read_config(sys.argv[1])
    _import_own(config.task_run.spec.work)
    for module, name in missing:
        delattr(module, name)
    del sys.path[:2]
    sys.path.append(brought)
    sys.modules.pop("msgspec")  # the user's own, from now on
    rank.run(sys.argv[1], config)


def _import_own(work: typing.Any) -> None:
    """Import the module of a function of this package, which may need the stand-in: of an internal task."""
    if getattr(work, "form", "") == "module" and work.code.startswith(b"rhapsody_mcp."):
        import_module(work.code.decode().partition(":")[0])


def _do_without_ctypes() -> None:
    """Where this Python was built without ctypes, let only Python's own output be flushed."""
    try:
        import ctypes  # noqa: F401
    except ImportError:
        nothing = SimpleNamespace(buffer_lines=lambda: None, flush=lambda *_: None)
        sys.modules[_C_STREAMS] = nothing  # type: ignore[assignment]


_C_STREAMS = "rhapsody_mcp.engine.isolation.c_streams"


class _StrEnum(str, enum.Enum):  # noqa: UP042
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]


_LATER_NAMES = {(enum, "StrEnum"): _StrEnum, (typing, "Self"): typing.Any}
"""What Python 3.10 lacks, and what this package imports by these names."""
