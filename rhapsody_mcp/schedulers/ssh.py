"""The command line of ssh for programs: without a terminal, and without questions."""

from __future__ import annotations

__all__ = ["ssh_command", "ssh_words"]

_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ControlMaster=no")
"""A connection that somebody shares (ControlPath) is used, and none is opened for others: it would outlive the call."""


def ssh_command(host: str, command: str) -> list[str]:
    """The arguments that run `command` in the login shell of the user on `host`."""
    return ["ssh", "-T", *(word for option in _OPTIONS for word in ("-o", option)), host, command]


def ssh_words(stderr: str) -> str:
    """Why ssh has failed, in its own words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("ssh: ") if lines else "ssh gave no reason"
