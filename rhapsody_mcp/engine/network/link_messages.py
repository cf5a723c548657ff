"""The messages between a backend and its node links, and the configuration of a node link."""

from __future__ import annotations

import msgspec

__all__ = ["EndNode", "FromNode", "KeeperEnded", "LinkSettings", "NodeHello", "StartKeeper", "ToNode"]

# --- node link → backend


class NodeHello(msgspec.Struct, frozen=True, tag="node_hello", gc=False):
    """A node link is connected. `folder` is the folder on its node for the files of engines; it exists."""

    host: str
    pid: int
    folder: str


class KeeperEnded(msgspec.Struct, frozen=True, tag="keeper_ended", gc=False):
    """The keeper with this name has ended, and so has everything that it started. `log` is the end of its log."""

    name: str
    exit_code: int
    log: str


FromNode = NodeHello | KeeperEnded


# --- backend → node link


class StartKeeper(msgspec.Struct, frozen=True, tag="start_keeper", gc=False):
    """Write the files into a new folder `name` in the folder of the node link, and start a keeper with these arguments
    and environment. The new folder is deleted when the keeper has ended."""

    name: str
    mark: str
    arguments: list[str]
    files: dict[str, bytes]
    environment: dict[str, str]


class EndNode(msgspec.Struct, frozen=True, tag="end_node", gc=False):
    """Stop every keeper, then end."""


ToNode = StartKeeper | EndNode


# --- configuration


class LinkSettings(msgspec.Struct, frozen=True, gc=False):
    """The configuration of a node link, as JSON in the environment variable `RHAPSODY_NODE_LINK`.

    The node link dials the addresses, in any order; `pem` is the key of the connection. It ends everything on its node
    when it has heard nothing for `lease_s` seconds: after that the backend may run the tasks of this node elsewhere.
    """

    addresses: list[str]
    port: int
    pem: str
    lease_s: float
