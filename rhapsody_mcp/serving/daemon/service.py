"""The service: it has the sessions and their ledger, and serves whoever of its user calls at its socket."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.abc import UNIXSocketStream
from pydantic import ValidationError

from rhapsody_mcp import __version__
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.model.errors import InvalidSettings, RhapsodyError, refuse_unknown
from rhapsody_mcp.protocol.audit import Audit, open_audit
from rhapsody_mcp.protocol.task_store import HandlesInLedger
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.call_context import current_folder, current_peer
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.server import Server, build_server, open_sessions
from rhapsody_mcp.serving.daemon.connection import ServiceUnavailable
from rhapsody_mcp.serving.daemon.control_server import obey
from rhapsody_mcp.serving.daemon.unix_listener import Door
from rhapsody_mcp.serving.peer_credentials import Peer
from rhapsody_mcp.serving.stream_server import Wire, serve_client
from rhapsody_mcp.settings import Settings, read_settings, settings_file

__all__ = ["Service", "run_service"]

_log = logging.getLogger(__name__)
_LOOK_S = 1.0
"""How often the service looks whether its socket can still be found."""
_ALIVE_S = 1.0
"""How often it is written down that sessions live: so wrong may be the end of what is lost with a crash."""
_HELLO_S = 10.0
_GRACE_S = 5.0
_HOUR_S, _DAY_S = 3600.0, 86400.0
_OFFERED = ("read_only", "toolsets", "http_token_file", "http_allowed_hosts")
"""What a client decides for itself; all else is decided by whoever started the service."""
_FILES = 8192
"""Descriptors; a connection takes one, and what a session starts takes some. Its tasks inherit the limit."""


async def run_service(settings: Settings, door: Door, ready: Callable[[], None], file: Path | None = None) -> None:
    """Returns once it was told to end, by SIGTERM, SIGINT or an order, or has long been idle, and nothing that it
    started is left; its sessions are in the ledger. After SIGKILL the keepers of the engines see to that. `file` is
    where the settings were read, None for the user's own.

    Raises LedgerError where the ledger cannot be opened, before `ready` is called.
    """
    _raise_limit()
    ledger = Ledger(door.places.state)
    await anyio.to_thread.run_sync(ledger.open)
    _log.info("version %s starts, process %d, settings of %s", __version__, os.getpid(), file or settings_file())
    try:
        handles = HandlesInLedger(ledger)
        await handles.load()
        with open_audit(door.places.audit, settings) as audit:
            async with open_sessions(settings, ledger) as sessions, TasksExtension(handles) as tasks:
                await Service(settings, door, sessions, tasks, audit, file).run(ready)
    finally:
        door.say("ends")
        await ledger.close()
        _log.info("process %d ends", os.getpid())


def _raise_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Service:
    """Serves sessions that outlive every connection to it."""

    def __init__(
        self,
        settings: Settings,
        door: Door,
        sessions: SessionRegistry,
        tasks: TasksExtension,
        audit: Audit,
        file: Path | None = None,
    ) -> None:
        self.settings, self.sessions, self.tasks, self.audit = settings, sessions, tasks, audit
        self.places = door.places
        self.settings_file = file or settings_file()
        self._file = file
        self.started = time.time()
        self.ending = anyio.Event()
        """Set where it shall end."""
        self.connections = 0
        """How many clients use its sessions now."""
        self.listeners: list[str] = []
        """Where it listens on HTTP."""
        self._door = door
        self._used = time.monotonic()
        self._clients: set[anyio.CancelScope] = set()
        self.fronts: set[anyio.Event] = set()
        """Of each listener: set when it has closed."""
        self.held: list[int] = []
        """Descriptors that are open until this process ends."""
        self._group: anyio.abc.TaskGroup
        self._trouble = ""
        self._servers: dict[tuple[Any, ...], Server] = {}
        sessions.watch(lambda opened, task: self._use())

    def _use(self) -> None:
        self._used = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Nobody uses it, and there is nothing to keep."""
        in_use = self.connections or self.fronts or self.sessions.all()
        return not in_use and self.sessions.restored.is_set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Until `ending`; then every client is cut off, and what the sessions started ends.

        New callers are told that it ends, and hear of the end by the end of their connections."""
        async with anyio.create_task_group() as self._group:
            await self._group.start(self._end_on_signal)
            self._group.start_soon(self._restore)
            self._group.start_soon(self._accept)
            self._group.start_soon(self._keep_socket)
            self._group.start_soon(self._end_when_idle)
            self._group.start_soon(self._forget)
            self._group.start_soon(self._note_life)
            self._door.say("serves")
            ready()
            await self.ending.wait()
            self._door.say("ends")
            self._cut_off()
            await self.sessions.suspend()
            with anyio.move_on_after(_GRACE_S):
                for closed in list(self.fronts):
                    await closed.wait()
            self._group.cancel_scope.cancel()

    async def _restore(self) -> None:
        """Where that fails nobody is served: what the ledger holds must not seem to be gone."""
        try:
            await self.sessions.restore()
        except Exception as error:
            _log.exception("the sessions of the ledger cannot be opened again")
            self._trouble = f"the sessions of the ledger cannot be opened again: {error} (more in {self.places.log})."
            self._cut_off()

    async def _forget(self) -> None:
        """Sessions that nobody has used for long, now and every hour."""
        await self.sessions.restored.wait()
        while True:
            try:
                await self.sessions.prune(time.time() - self.settings.keep_sessions_days * _DAY_S)
            except Exception:  # nothing is lost where it is tried again later
                _log.exception("old sessions cannot be forgotten")
            await anyio.sleep(_HOUR_S)

    async def _note_life(self) -> None:
        while True:
            await anyio.sleep(_ALIVE_S)
            self.sessions.note_life()

    def _cut_off(self) -> None:
        for scope in self._clients:
            scope.cancel()

    async def _end_on_signal(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                _log.info("it was sent %s", signal.Signals(number).name)
                self.ending.set()

    async def _end_when_idle(self) -> None:
        while True:
            if not self.is_idle:
                self._use()
            left = self._used + self.settings.service_idle_s - time.monotonic()
            if left <= 0:
                _log.info("nobody has used it for %g s", self.settings.service_idle_s)
                self.ending.set()
                return
            await anyio.sleep(left)

    # --- the socket

    async def _keep_socket(self) -> None:
        """Temporary folders are swept: whoever starts a client then must find this service, and not start another."""
        troubled = False
        while True:
            await anyio.sleep(_LOOK_S)
            try:
                gone = self._door.repair()
                troubled = False
            except (OSError, RhapsodyError) as error:
                if not troubled:
                    _log.warning("the socket %s is gone and cannot be made again: %s", self.places.socket, error)
                troubled = True
                continue
            if gone is not None:
                _log.warning("the socket %s was gone or another's; it was made again", self.places.socket)
                anyio.notify_closing(gone)
                gone.close()

    async def _accept(self) -> None:
        while True:
            listener = self._door.listener
            try:
                await anyio.wait_readable(listener)
                accepted, _ = listener.accept()
            except (anyio.ClosedResourceError, BlockingIOError, ConnectionAbortedError):
                continue  # another listener has its place, or who called has left
            except OSError as error:
                _log.warning("a client cannot be let in: %s", error)
                await anyio.sleep(_LOOK_S)
                continue
            self._group.start_soon(self._answer, accepted)

    async def _answer(self, accepted: socket.socket) -> None:
        peer = Peer.of(accepted)
        current_peer.set(str(peer))
        async with await UNIXSocketStream.from_socket(accepted) as stream:
            wire = Wire(stream, self.settings.request_bytes)
            try:
                await self._serve(wire, peer)
            except Exception:  # one connection must not end the others
                _log.exception("a connection of %s failed", peer)

    async def _serve(self, wire: Wire, peer: Peer) -> None:
        if not peer.is_us:  # nothing of it is read
            await wire.tell(rhapsody=__version__, error=f"this service is that of uid {os.geteuid()} alone.")
            return
        hello: dict[str, Any] = {}
        with anyio.move_on_after(_HELLO_S):
            hello = await wire.hear()
        if self.ending.is_set():
            self.held.append(wire.held())
            await wire.tell(rhapsody=__version__, ending=True)
        elif hello.get("as") not in ("mcp", "control"):
            await wire.tell(rhapsody=__version__, error="no hello of rhapsody-mcp's: use `rhapsody-mcp stdio`.")
        else:
            await self._greet(wire, hello)

    async def _greet(self, wire: Wire, hello: dict[str, Any]) -> None:
        try:
            server = self._server(self.offer(hello.get("offer", {}))) if hello["as"] == "mcp" else None
            if server is not None and self._trouble:
                raise ServiceUnavailable(self._trouble)
            notes = await anyio.to_thread.run_sync(self._notes, hello.get("config"))
        except RhapsodyError as error:
            await wire.tell(rhapsody=__version__, error=str(error))
            return
        await wire.tell(rhapsody=__version__, pid=os.getpid(), notes=notes)
        if server is None:
            await obey(self, wire)
        else:
            current_folder.set(_folder(hello))
            with self._client():
                await serve_client(server, wire, wire)

    @contextmanager
    def _client(self) -> Iterator[None]:
        """One more uses the sessions within this block, which is left when the service ends."""
        self.connections += 1
        with anyio.CancelScope() as scope:
            self._clients.add(scope)
            try:
                yield
            finally:
                self._clients.discard(scope)
                self.connections -= 1
                self._use()

    def offer(self, wanted: dict[str, Any]) -> Settings:
        """The service's settings with what a client wants to be offered. Raises InvalidRequest."""
        refuse_unknown("setting of a client", wanted, _OFFERED)
        try:
            return Settings(**{**dict(self.settings), **wanted})
        except ValidationError as error:
            raise InvalidSettings(f"the service cannot offer this: {error.errors()[0]['msg']}.") from error

    def _server(self, settings: Settings) -> Server:
        """One for all clients that are offered the same; making it takes longer than a client wants to wait."""
        offered = (settings.read_only, settings.toolsets)
        if (server := self._servers.get(offered)) is None:
            server = self._servers[offered] = build_server(settings, self.sessions, [self.tasks], self.audit)
        return server

    def _notes(self, config: str | None) -> list[str]:
        """What a client should know: that its settings are not those by which it is served.

        Raises InvalidSettings where a file that was named cannot be read."""
        try:
            wanted = read_settings(Path(config) if config else None)
        except InvalidSettings as error:
            if config:
                raise
            return [str(error)]
        if not (differing := self._differing(wanted)):
            return []
        return [
            f"the running service took its settings when it started; these differ: {differing}. It takes others when "
            f"it starts again: first rhapsody-mcp service stop{self.places.option}."
        ]

    def _differing(self, wanted: Settings) -> str:
        own, other = dict(self.settings), dict(wanted)
        return ", ".join(key for key in own if own[key] != other[key])

    def settings_changed(self) -> str:
        """Which settings its file now gives another value, or why it cannot be read; empty where it is as it was."""
        try:
            return self._differing(read_settings(self._file))
        except InvalidSettings as error:
            return str(error)


def _folder(hello: dict[str, Any]) -> str:
    """Where the client is, if that is a folder on this host."""
    folder = str(hello.get("cwd", ""))
    return folder if os.path.isabs(folder) and os.path.isdir(folder) else ""
