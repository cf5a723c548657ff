"""Ends and deletes what an engine has left on this node.

    python -m rhapsody_mcp.engine.clear_node [FOLDER]

Waits until FOLDER, the folder of a node link, is gone with all processes of its keepers; deletes the files of Dragon in
/dev/shm that no process uses.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rhapsody_mcp.engine.process.run_dirs import sweep
from rhapsody_mcp.engine.process.shared_memory import old_dragon_files, unlink_unused

__all__ = ["main"]

_INTERVAL_S = 0.1
_WITHIN_S = 60.0


def main() -> int:
    """Return 0 once nothing is left, 1 where that takes too long."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    deadline = time.monotonic() + _WITHIN_S
    while any(folder.exists() for folder in folders) and time.monotonic() < deadline:
        for folder in folders:
            sweep(folder)
        time.sleep(_INTERVAL_S)
    unlink_unused(old_dragon_files())
    return int(any(folder.exists() for folder in folders))


if __name__ == "__main__":
    sys.exit(main())
