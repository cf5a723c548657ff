"""What a running service knows of itself, for the control server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from rhapsody_mcp.protocol.audit import Audit
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import Settings, settings_file

__all__ = ["ServiceState"]


@dataclass(kw_only=True)
class ServiceState:
    """A service's parts, and who uses them now."""

    paths: ServicePaths
    settings: Settings
    config: Path | None
    """The settings file that the service was started with; None for the user's own file."""
    sessions: SessionRegistry
    tasks: TasksExtension
    audit: Audit
    started: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    stop_requested: anyio.Event = field(default_factory=anyio.Event)
    clients: int = 0
    """How many MCP clients are connected to the Unix socket."""
    http_addresses: list[str] = field(default_factory=list)
    http_closed: set[anyio.Event] = field(default_factory=set)
    """One event for each HTTP listener, set when the listener has closed."""
    descriptors_until_exit: list[int] = field(default_factory=list)
    """Open descriptors of connections whose peers wait for the end of this process."""

    @property
    def settings_file(self) -> Path:
        return self.config or settings_file()

    @property
    def is_idle(self) -> bool:
        """No client, no HTTP listener and no open session, in the ledger either."""
        in_use = self.clients or self.http_closed or self.sessions.all()
        return not in_use and self.sessions.restored.is_set()
