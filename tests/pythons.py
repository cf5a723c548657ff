"""Other Pythons than that of the tests, where this machine has them, and packages that need no index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

__all__ = ["OTHER_VERSIONS", "make_wheel", "other_python"]

OTHER_VERSIONS = [
    version for version in ("3.10", "3.12", "3.13", "3.14") if version != "{}.{}".format(*sys.version_info)
]


@cache
def _found(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    on_path = shutil.which(f"python{version}")
    for python in [*map(str, sorted(pyenv.glob(f"{version}.*/bin/python3"))), *([on_path] if on_path else [])]:
        asked = subprocess.run([python, "-c", "import ctypes"], capture_output=True, check=False)
        if asked.returncode == 0:
            return python
    return None


def other_python(version: str) -> str:
    """The path of a Python of this version; skips the test where there is none."""
    if (python := _found(version)) is None:
        pytest.skip(f"no Python {version} is on this machine")
    return python


def make_wheel(folder: Path, name: str, text: str) -> str:
    """A wheel of one module, which pip installs without an index."""
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name}-hello = {name}:hello\n")
        file.writestr(f"{info}/RECORD", "")
    return str(wheel)
