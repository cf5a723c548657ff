"""The program that makes one environment: a complete one, or none.

    python -I environment_builder.py ENVIRONMENT INTERPRETER PACKAGE...

ENVIRONMENT becomes a link to the folder of the environment, once that is complete: the programs that pip installs name
that folder, which therefore keeps its name. A lock has other builders of the same environment wait.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    environment, interpreter, *packages = sys.argv[1:]
    link = Path(environment)
    link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(f"{link}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not link.exists():
            _make(link, interpreter, packages)


def _make(link: Path, interpreter: str, packages: list[str]) -> None:
    for unfinished in link.parent.glob(f"{link.name}.made-*"):
        shutil.rmtree(unfinished)
    folder = tempfile.mkdtemp(dir=link.parent, prefix=f"{link.name}.made-")
    try:
        _fill(folder, interpreter, packages)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    new = Path(f"{link}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.basename(folder))
    new.rename(link)


def _fill(folder: str, interpreter: str, packages: list[str]) -> None:
    python = os.path.join(folder, "bin", "python")
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    if uv := shutil.which("uv", path=search):
        _run([uv, "venv", "--quiet", "--allow-existing", "--python", interpreter, folder])
        _run([uv, "pip", "install", "--quiet", "--python", python, *packages])
    else:
        _run([interpreter, "-m", "venv", folder])
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *packages])


def _run(command: list[str]) -> None:
    """Run the command; where it fails, end this program."""
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code if code > 0 else 1)


if __name__ == "__main__":
    main()
