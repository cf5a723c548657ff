"""A service that somebody kills while it starts is started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_DIES_ONCE = """
import os, sys
if sys.orig_argv[-1:] and "run" in sys.orig_argv and "service" in sys.orig_argv:
    try:
        os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        os._exit(9)
"""


def rhapsody(*arguments: str, folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rhapsody_mcp", *arguments, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_start_that_is_cut_off_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_DIES_ONCE.format(mark=str(tmp_path / "died")), encoding="utf-8")
    place = tmp_path / "p"
    started = rhapsody("service", "start", folder=place, path=tmp_path)
    try:
        assert (started.returncode, (tmp_path / "died").exists()) == (0, True), started.stderr
    finally:
        rhapsody("service", "stop", "--force", folder=place, path=tmp_path)
