"""Finds the Python that a user has named, and asks what it is."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from rhapsody_mcp.model.errors import InvalidTask

__all__ = ["LEAST_VERSION", "Interpreter", "find_interpreter", "python_path"]

LEAST_VERSION = (3, 10)
_LIMIT_S = 10.0
_ASK = "import sys; print('python', *sys.version_info[:2])"


class Interpreter(NamedTuple):
    """A Python that was asked: its path, as the user sees it, and its version."""

    path: str
    version: tuple[int, int]

    @property
    def version_text(self) -> str:
        return "{}.{}".format(*self.version)

    @property
    def variables(self) -> dict[str, str | None]:
        """Variables that select this Python for programs; None removes one."""
        folder = Path(self.path).parent.parent
        return {
            "VIRTUAL_ENV": str(folder) if (folder / "pyvenv.cfg").exists() else None,
            "CONDA_PREFIX": str(folder) if (folder / "conda-meta").is_dir() else None,
            "PYTHONHOME": None,
        }

    def path_with(self, path: str) -> str:
        """The variable PATH with the folder of this Python first."""
        return os.pathsep.join(dict.fromkeys([os.path.dirname(self.path), *path.split(os.pathsep)]))


def find_interpreter(python: str, folder: str, path: str | None = None) -> Interpreter:
    """The Python that is an interpreter, a folder of an environment, or a name on `path`, seen from `folder`.

    Raises InvalidTask, which says what was found, where it is no Python of at least LEAST_VERSION.
    """
    interpreter = python_path(python, folder, path)
    try:
        version = _version(interpreter, os.stat(interpreter).st_mtime_ns)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise _refusal(python, f"{interpreter} is no Python: {why}") from None
    if version < LEAST_VERSION:
        found = "{}.{}".format(*version)
        raise _refusal(python, f"{interpreter} is Python {found}, older than {'.'.join(map(str, LEAST_VERSION))}")
    return Interpreter(interpreter, version)


def python_path(python: str, folder: str, path: str | None = None) -> str:
    """The full path of the interpreter. Raises InvalidTask where there is none."""
    file = os.path.join(folder, os.path.expanduser(python))
    if os.path.isdir(file):
        names = [os.path.join(file, "bin", name) for name in ("python", "python3")]
        if found := next(filter(os.path.exists, names), None):
            return os.path.abspath(found)
        raise _refusal(python, f"{file} is a folder without bin/python")
    if os.path.exists(file):
        return os.path.abspath(file)
    if os.sep not in python and (on_path := shutil.which(python, path=path)):
        return on_path
    raise _refusal(python, f"{file} does not exist on {os.uname().nodename}")


@functools.lru_cache(maxsize=256)
def _version(interpreter: str, _changed_ns: int) -> tuple[int, int]:
    """Raises OSError, ValueError or SubprocessError where the program is no Python."""
    asked = subprocess.run(
        [interpreter, "-E", "-c", _ASK],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_LIMIT_S,
        check=False,
    )
    word, *numbers = asked.stdout.split()[:3] or [""]
    if word != "python" or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        said = " ".join((asked.stderr or asked.stdout).split())[-200:]
        raise ValueError(f"asked for its version, it ended with exit code {asked.returncode}{said and f': {said}'}")
    return int(numbers[0]), int(numbers[1])


def _refusal(python: str, found: str) -> InvalidTask:
    least = ".".join(map(str, LEAST_VERSION))
    return InvalidTask(
        f"python is {python!r}: {found}. Valid is an interpreter of Python {least} or later, as in "
        '"/opt/python/bin/python3", or the folder of an environment with bin/python.',
        field="python",
    )
