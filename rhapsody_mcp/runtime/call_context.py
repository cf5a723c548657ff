"""The client of the current call."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["current_caller", "current_client", "current_folder", "current_peer"]

current_caller: ContextVar[str] = ContextVar("current_caller", default="")
"""For example `claude-code 2.1 over stdio`, or `token laptop: claude-code 2.1 over http`; empty outside a call."""

current_client: ContextVar[str] = ContextVar("current_client", default="")
"""The name that the client of the call states, unverified, for example `claude-code`; empty where it states none."""

current_peer: ContextVar[str] = ContextVar("current_peer", default="")
"""The process at the other end of the connection, for example `uid 1000, pid 4242`. Set by the server that accepts the
connection."""

current_folder: ContextVar[str] = ContextVar("current_folder", default="")
"""The working directory of the client, from which relative paths start; empty for that of this process."""
