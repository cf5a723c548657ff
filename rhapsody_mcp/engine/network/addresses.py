"""Finds the addresses of this node by which other nodes may reach it."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from rhapsody_mcp.model.errors import InvalidSettings

__all__ = [
    *("NETWORK_PREFIX", "Interface", "dragon_network_prefix", "interfaces", "reachable_addresses"),
    "refuse_unknown_network",
]

NETWORK_PREFIX = "RHAPSODY_NETWORK_PREFIX"
"""The environment variable with a regular expression for the interfaces by which nodes reach each other."""

_FAST = r"^(hsn|ipogif|ib)\d+$"
"""The names of the networks of HPE Cray machines, and of InfiniBand: Dragon's own default."""

_SIOCGIFADDR = 0x8915
"""linux/sockios.h: the request for the IPv4 address of an interface."""


class Interface(NamedTuple):
    """A network interface and its IPv4 address."""

    name: str
    address: str


def interfaces() -> list[Interface]:
    """Return the interfaces that have an IPv4 address, without the loopback interface."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # the interface has no IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(Interface(name, socket.inet_ntoa(answer[20:24])))
    return [interface for interface in found if not interface.address.startswith("127.")]


def reachable_addresses(prefix: str | None = None) -> list[str]:
    """Return the addresses of the interfaces whose name matches the regular expression, by default of all; where there
    is none, the loopback address."""
    return [interface.address for interface in interfaces() if prefix is None or re.search(prefix, interface.name)] or [
        "127.0.0.1"
    ]


def refuse_unknown_network(prefix: str) -> None:
    """Raise InvalidSettings where no interface has a name that matches the regular expression."""
    found = interfaces()
    try:
        known = any(re.search(prefix, interface.name) for interface in found)
    except re.error as error:
        raise InvalidSettings(f"network_prefix is {prefix!r}, which is no regular expression: {error}.") from error
    if not known:
        names = ", ".join(f"{interface.name} ({interface.address})" for interface in found)
        raise InvalidSettings(
            f"network_prefix is {prefix!r}, and no network interface of {socket.gethostname()} matches; it has {names}."
            " Give a regular expression for the interface that connects the nodes, or leave network_prefix out."
        )


def dragon_network_prefix() -> str:
    """Return the regular expression for the interfaces that Dragon uses: that of the environment, else the fast
    networks, else the interface with the address of this node's name.

    Raises InvalidSettings where no interface of this node matches that of the environment.
    """
    found = interfaces()
    if chosen := os.environ.get(NETWORK_PREFIX):
        refuse_unknown_network(chosen)
        return chosen
    if any(re.search(_FAST, interface.name) for interface in found):
        return _FAST
    with suppress(OSError):
        own = socket.gethostbyname(socket.gethostname())
        found = [interface for interface in found if interface.address == own] or found
    return f"^{re.escape(found[0].name)}$" if found else _FAST
