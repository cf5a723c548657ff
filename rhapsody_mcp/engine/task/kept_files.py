"""Keeps copies of the files that a task leaves in its working directory, as parts of its result.

The copies lie beside the files of long results, and are delivered, counted and deleted as these are.
"""

from __future__ import annotations

import glob
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import msgspec

from rhapsody_mcp.engine.messages import FunctionResult
from rhapsody_mcp.engine.task.error_text import sendable
from rhapsody_mcp.engine.task.output import end_part, open_part
from rhapsody_mcp.engine.views.pictures import describe_file
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import NOTHING, PREVIEW_CHARS, Value, as_tree

__all__ = ["with_outputs"]

_MOST_FILES = 1000
_TOO_MANY = f"its outputs are more than {_MOST_FILES} files. Put them into an archive, or keep fewer."
_LISTED = 20
_CLOCK_S = 1.0
"""How far the clocks of a file system and of a node may differ, in seconds."""
_LISTED_FROM = 2000
"""Files of a folder that are looked at for a message."""
_INNER_CHARS = 1000
_EXTENSION_CHARS = 12


class _Refused(Exception):
    """Raised with the reason if the files cannot be kept."""


def with_outputs(
    result: FunctionResult,
    patterns: Sequence[str],
    cwd: str,
    folder: str,
    max_bytes: int | None,
    started: float | None = None,
) -> FunctionResult:
    """Return the result with the files in `cwd` that match the patterns, copied into `folder`. It is a failure where a
    pattern matches no file, and where the files have more than `max_bytes` together. A note tells of files that are
    older than `started`."""
    if not patterns or result.cause is not None:
        return result
    try:
        names = list(dict.fromkeys(name for pattern in patterns for name in _matching(pattern, cwd)))
        _check_amount(names, cwd, max_bytes)
        value = _kept(names, cwd, folder, result.value or NOTHING)
        return msgspec.structs.replace(result, value=value, notes=(*result.notes, *_older(names, cwd, started)))
    except _Refused as error:
        problem = str(error)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        problem = f"its outputs could not be kept: {error}"
    return FunctionResult(None, Cause.ERROR, f"it ended, and {sendable(problem)}")


def _matching(pattern: str, cwd: str) -> list[str]:
    files, folder = set[str](), ""
    for name in _found(pattern, cwd, pattern.startswith(".")):
        path = os.path.join(cwd, name)
        if os.path.isfile(path):
            files.add(_sendable_name(os.path.normpath(name)))
        elif not folder and os.path.isdir(path):
            folder = f"; {name} is a folder: write {name.rstrip('/')}/*"
        if len(files) > _MOST_FILES:
            raise _Refused(_TOO_MANY)
    if not files:
        raise _Refused(f"no file in {cwd} matches {pattern!r} of its outputs{folder}. {_there(cwd)}")
    return sorted(files)


def _found(pattern: str, cwd: str, with_hidden: bool) -> Iterator[str]:
    """Yield what glob finds, one by one. Here `**` does not lead into links to folders, which may lead round."""
    steps = pattern.split("/")
    if "**" not in steps:
        yield from glob.iglob(pattern, root_dir=cwd, include_hidden=with_hidden)
        return
    at = steps.index("**")
    rest = "/".join(itertools.dropwhile("**".__eq__, steps[at:])) or "*"
    tops = glob.iglob("/".join(steps[:at]), root_dir=cwd, include_hidden=with_hidden) if at else [""]
    for top in tops:
        for folder, below, _ in os.walk(os.path.join(cwd, top)):
            below[:] = (name for name in below if with_hidden or not name.startswith("."))
            yield from (os.path.relpath(os.path.join(folder, name), cwd) for name in _found(rest, folder, with_hidden))


def _older(names: Sequence[str], cwd: str, started: float | None) -> Iterator[str]:
    """Yield a sentence about the files that were there before the task."""
    limit = (started or 0.0) - _CLOCK_S
    if old := [name for name in names if _changed(os.path.join(cwd, name)) < limit]:
        more = f" and {len(old) - _LISTED} more" if len(old) > _LISTED else ""
        yield f"of its outputs these are older than the task: {', '.join(old[:_LISTED])}{more}"


def _sendable_name(name: str) -> str:
    if sendable(name) != name:
        raise _Refused(f"the name of its output {sendable(name)!r} is no text in UTF-8: rename it, or do not keep it.")
    return name


def _there(cwd: str) -> str:
    """Tell the files that are there, the newest first."""
    paths = list(itertools.islice(_files_below(cwd), _LISTED_FROM))
    newest = sorted(paths, key=_changed, reverse=True)
    names = [os.path.relpath(path, cwd) for path in newest[:_LISTED]]
    more = f" and {len(paths) - len(names)} more" if len(paths) > len(names) else ""
    return f"Files there, the newest first: {', '.join(names)}{more}." if names else "There are no files."


def _changed(path: str) -> float:
    with suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


def _files_below(cwd: str) -> Iterator[str]:
    for folder, folders, names in os.walk(cwd):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _check_amount(names: Sequence[str], cwd: str, max_bytes: int | None) -> None:
    if len(names) > _MOST_FILES:
        raise _Refused(_TOO_MANY)
    size = sum(os.path.getsize(os.path.join(cwd, name)) for name in names)
    if max_bytes is not None and size > max_bytes:
        raise _Refused(
            f"its outputs have {size:,} bytes together; {max_bytes:,} is the most (max_result_bytes in the settings of "
            "the server). Keep less, and hand on the paths of large files."
        )


def _kept(names: Sequence[str], cwd: str, folder: str, inner: Value) -> Value:
    """Copy the files, and return the result with the copies."""
    with ExitStack() as undo:
        kept: dict[str, str] = {}
        for name in names:
            kept[name] = _copy(os.path.join(cwd, name), folder)
            undo.callback(os.unlink, kept[name])
        value = _value(inner, kept)
        undo.pop_all()
        return value


def _copy(path: str, folder: str) -> str:
    extension = os.path.splitext(path)[1]
    with open(path, "rb") as source, open_part(folder) as part:
        try:
            shutil.copyfileobj(source, part, 1024 * 1024)
        except BaseException:
            os.unlink(part.name)
            raise
    usable = extension[1:].isalnum() and extension != ".part" and len(extension) <= _EXTENSION_CHARS
    return end_part(part, extension if usable else ".file")


# --- the value


def _value(inner: Value, files: dict[str, str]) -> Value:
    sizes = {path: os.path.getsize(path) for path in files.values()}
    described = {name: describe_file(path) for name, path in files.items()}
    shown = msgspec.json.encode({"result": _shown(inner), "files": as_tree(described)})
    return Value(
        "files",
        "dict",
        inner.size + sum(sizes.values()),
        length=2,
        preview=shown[:PREVIEW_CHARS].decode("utf-8", "ignore"),
        about=f"result and {len(files)} file{'s' * (len(files) != 1)}",
        inner=inner,
        files=files,
    )


def _shown(inner: Value) -> Any:
    if inner.format == "json" and inner.data is not None and len(inner.data) <= _INNER_CHARS:
        return msgspec.Raw(inner.data)
    return f"{inner.preview[:_INNER_CHARS]} ... ({inner.about or inner.type}, {inner.size} bytes)"
