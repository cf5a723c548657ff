"""Assistants of the command line, as npm installs them, each run in a home of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

__all__ = ["MODULES", "needs_assistants", "run_in"]

_PACKAGES = os.environ.get("RHAPSODY_NODE_PACKAGES")
MODULES = Path(_PACKAGES or "") / "node_modules"
needs_assistants = pytest.mark.skipif(
    _PACKAGES is None, reason="RHAPSODY_NODE_PACKAGES names no folder with the assistants"
)


def run_in(
    home: Path, words: Sequence[str], variables: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a command line in a project of this home, with these variables and few others."""
    (project := home / "project").mkdir(exist_ok=True)
    environment = {"PATH": f"{MODULES / '.bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)}
    return subprocess.run(
        words,
        cwd=project,
        env={**environment, "LANG": "C.UTF-8", "DISABLE_AUTOUPDATER": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
