"""Who makes the call that is being served."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["current_caller", "current_folder", "current_peer"]

current_caller: ContextVar[str] = ContextVar("current_caller", default="")
"""As in `claude-code 2.1 over stdio`, or `token laptop: claude-code 2.1 over http`; empty outside a call."""

current_peer: ContextVar[str] = ContextVar("current_peer", default="")
"""What the system knows of the other end, as in `uid 1000, pid 4242`; whoever accepts a connection sets it."""

current_folder: ContextVar[str] = ContextVar("current_folder", default="")
"""Where the caller is, and its relative paths begin; empty for the folder of this process."""
