"""The program that Dragon runs on one of its nodes: it starts a node link on every node.

    dragon … python -m rhapsody_mcp.engine.head

It ends, and with it Dragon's runtime, when its lifeline closes or all node links have ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from rhapsody_mcp.engine.node.launchers import TASK_VARIABLES, DragonLauncher
from rhapsody_mcp.engine.node_link import NODE_LINK
from rhapsody_mcp.engine.process.tree import ENGINE, LIFELINE, open_lifeline

__all__ = ["main"]


def main() -> None:
    threading.Thread(target=_end_with_owner, daemon=True).start()
    for link in _start_links():
        link.join()
    os._exit(0)  # a normal exit would wait for Dragon's threads


def _end_with_owner() -> None:
    if not os.path.exists(os.environ[LIFELINE]):
        return  # Dragon chose another node than the keeper's: without the owner the node links end, and then the head
    os.read(open_lifeline(), 1)
    os._exit(0)


def _start_links() -> list[Any]:
    launcher = DragonLauncher()
    variables = json.loads(os.environ.get(TASK_VARIABLES, "{}"))
    env = {**variables, NODE_LINK: os.environ[NODE_LINK], ENGINE: os.environ[ENGINE], LIFELINE: os.devnull}
    command = [sys.executable, "-m", "rhapsody_mcp.engine.node_link"]
    return [launcher.launch_on(host, command, env) for host in launcher.hosts()]


if __name__ == "__main__":
    main()
