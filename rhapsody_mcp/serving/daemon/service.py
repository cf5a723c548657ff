"""The service process: holds the sessions and their ledger, and accepts connections of its user."""

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
import anyio.to_thread
from anyio.abc import UNIXSocketStream

from rhapsody_mcp import __version__
from rhapsody_mcp.dashboard.archive import prune_reports
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.model.errors import InvalidSettings, RhapsodyError
from rhapsody_mcp.protocol.audit import open_audit
from rhapsody_mcp.protocol.task_store import LedgerHandleStore
from rhapsody_mcp.protocol.tasks_extension import TasksExtension
from rhapsody_mcp.runtime.call_context import current_folder, current_peer
from rhapsody_mcp.server import Server, build_server, open_sessions
from rhapsody_mcp.serving.daemon.client_settings import client_settings, differing_keys
from rhapsody_mcp.serving.daemon.connection import ServiceUnavailable
from rhapsody_mcp.serving.daemon.control_server import ControlServer
from rhapsody_mcp.serving.daemon.state import ServiceState
from rhapsody_mcp.serving.daemon.unix_listener import UnixListener
from rhapsody_mcp.serving.peer_credentials import Peer
from rhapsody_mcp.serving.stream_server import LineStream, serve_client
from rhapsody_mcp.settings import Settings, read_settings, settings_file

__all__ = ["Service", "run_service"]

_log = logging.getLogger(__name__)
_SOCKET_CHECK_S = 1.0
_ALIVE_S = 1.0
"""How often the ledger gets the time until which sessions lived: the precision of the end of tasks lost in a crash."""
_HELLO_TIMEOUT_S = 10.0
_HTTP_CLOSE_TIMEOUT_S = 5.0
_HOUR_S, _DAY_S = 3600.0, 86400.0
_MAX_OPEN_FILES = 8192
"""Each connection takes one descriptor, each session takes several. Tasks inherit the limit."""


async def run_service(
    settings: Settings, listener: UnixListener, ready: Callable[[], None], config: Path | None = None
) -> None:
    """Serve until SIGTERM, SIGINT, SIGHUP, a stop command or a long idle time. On return nothing that the service
    started is left, and the ledger holds its sessions; after SIGKILL the keepers end the engines. `config` is the
    file of the settings, None for the user's own.

    Raises LedgerError where the ledger cannot be opened, before it calls `ready`.
    """
    _raise_file_limit()
    ledger = Ledger(listener.paths.state)
    await anyio.to_thread.run_sync(ledger.open)
    _log.info("version %s starts, process %d, settings of %s", __version__, os.getpid(), config or settings_file())
    try:
        handles = LedgerHandleStore(ledger)
        await handles.load()
        with open_audit(listener.paths.audit, settings) as audit:
            async with open_sessions(settings, ledger) as sessions, TasksExtension(handles) as tasks:
                state = ServiceState(
                    paths=listener.paths, settings=settings, config=config, sessions=sessions, tasks=tasks, audit=audit
                )
                await Service(state, listener, ledger).run(ready)
    finally:
        listener.publish("ends")
        await ledger.close()
        _log.info("process %d ends", os.getpid())


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


class Service:
    """Serves sessions that outlive the connections of clients."""

    def __init__(self, state: ServiceState, listener: UnixListener, ledger: Ledger) -> None:
        self._state, self._listener, self._ledger = state, listener, ledger
        self._settings, self._sessions = state.settings, state.sessions
        self._last_use = time.monotonic()
        self._client_scopes: set[anyio.CancelScope] = set()
        self._group: anyio.abc.TaskGroup
        self._restore_error = ""
        self._servers: dict[tuple[Any, ...], Server] = {}
        state.sessions.watch(lambda opened, task: self._note_use())

    def _note_use(self) -> None:
        self._last_use = time.monotonic()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop_requested`; then disconnect the clients and end all that the sessions started.

        Clients that connect meanwhile are told that the service ends, and see its end as the end of their
        connections."""
        async with anyio.create_task_group() as self._group:
            await self._group.start(self._stop_on_signal)
            self._group.start_soon(self._restore)
            self._group.start_soon(self._accept)
            self._group.start_soon(self._watch_socket)
            self._group.start_soon(self._stop_when_idle)
            self._group.start_soon(self._prune_sessions)
            self._group.start_soon(self._note_life)
            self._listener.publish("serves")
            ready()
            await self._state.stop_requested.wait()
            self._listener.publish("ends")
            self._disconnect_clients()
            await self._sessions.suspend()
            with anyio.move_on_after(_HTTP_CLOSE_TIMEOUT_S):
                for closed in list(self._state.http_closed):
                    await closed.wait()
            self._group.cancel_scope.cancel()

    async def _restore(self) -> None:
        """On an error no client is served: sessions of the ledger must not seem to be gone."""
        try:
            await self._sessions.restore()
        except Exception as error:
            _log.exception("the sessions of the ledger cannot be opened again")
            log = self._state.paths.log
            self._restore_error = f"the sessions of the ledger cannot be opened again: {error} (more in {log})."
            self._disconnect_clients()

    async def _prune_sessions(self) -> None:
        """Close sessions that have long been unused, at the start and then every hour."""
        await self._sessions.restored.wait()
        while True:
            try:
                await self._sessions.prune(time.time() - self._settings.keep_sessions_days * _DAY_S)
                before = time.time() - self._settings.keep_reports_days * _DAY_S
                await anyio.to_thread.run_sync(prune_reports, self._sessions.state_folder, before)
            except Exception:  # the next try does the same work
                _log.exception("old sessions cannot be forgotten")
            await anyio.sleep(_HOUR_S)

    async def _note_life(self) -> None:
        while True:
            await anyio.sleep(_ALIVE_S)
            if not await anyio.to_thread.run_sync(self._ledger.beat):
                _log.critical("another host has taken its ledger over: process %d ends at once", os.getpid())
                os._exit(1)  # a clean end would write to the ledger; the keepers end the engines
            self._sessions.write_heartbeats()

    def _disconnect_clients(self) -> None:
        for scope in self._client_scopes:
            scope.cancel()

    async def _stop_on_signal(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                _log.info("it was sent %s", signal.Signals(number).name)
                self._state.stop_requested.set()

    async def _stop_when_idle(self) -> None:
        while True:
            if not self._state.is_idle:
                self._note_use()
            left_s = self._last_use + self._settings.service_idle_s - time.monotonic()
            if left_s <= 0:
                _log.info("nobody has used it for %g s", self._settings.service_idle_s)
                self._state.stop_requested.set()
                return
            await anyio.sleep(left_s)

    # --- connections

    async def _watch_socket(self) -> None:
        """Repair the socket after a sweep of the temporary folder: a client that does not find it would start a second
        service."""
        failed = False
        while True:
            await anyio.sleep(_SOCKET_CHECK_S)
            path = self._state.paths.socket
            try:
                replaced = self._listener.repair()
                failed = False
            except (OSError, RhapsodyError) as error:
                if not failed:
                    _log.warning("the socket %s is gone and cannot be made again: %s", path, error)
                failed = True
                continue
            if replaced is not None:
                _log.warning("the socket %s was gone or another's; it was made again", path)
                anyio.notify_closing(replaced)
                replaced.close()

    async def _accept(self) -> None:
        while True:
            listening = self._listener.socket
            try:
                await anyio.wait_readable(listening)
                accepted, _ = listening.accept()
            except (anyio.ClosedResourceError, BlockingIOError, ConnectionAbortedError):
                continue  # the socket was replaced, or the client has left
            except OSError as error:
                _log.warning("a client cannot be let in: %s", error)
                await anyio.sleep(_SOCKET_CHECK_S)
                continue
            self._group.start_soon(self._handle_connection, accepted)

    async def _handle_connection(self, accepted: socket.socket) -> None:
        peer = Peer.of(accepted)
        current_peer.set(str(peer))
        async with await UNIXSocketStream.from_socket(accepted) as byte_stream:
            stream = LineStream(byte_stream, self._settings.request_bytes)
            try:
                await self._handshake(stream, peer)
            except Exception:  # other connections go on
                _log.exception("a connection of %s failed", peer)

    async def _handshake(self, stream: LineStream, peer: Peer) -> None:
        if not peer.is_same_user:  # reads nothing from another user
            await stream.send_message(rhapsody=__version__, error=f"this service is that of uid {os.geteuid()} alone.")
            return
        hello: dict[str, Any] = {}
        with anyio.move_on_after(_HELLO_TIMEOUT_S):
            hello = await stream.receive_message()
        if self._state.stop_requested.is_set():
            self._state.descriptors_until_exit.append(stream.duplicate_descriptor())
            await stream.send_message(rhapsody=__version__, ending=True)
        elif hello.get("as") not in ("mcp", "control"):
            error = "no hello of rhapsody-mcp's: use `rhapsody-mcp stdio`."
            await stream.send_message(rhapsody=__version__, error=error)
        else:
            await self._serve(stream, hello)

    async def _serve(self, stream: LineStream, hello: dict[str, Any]) -> None:
        try:
            server = None
            if hello["as"] == "mcp":
                server = self._server(client_settings(self._settings, hello.get("offer", {})))
                if self._restore_error:
                    raise ServiceUnavailable(self._restore_error)
            notes = await anyio.to_thread.run_sync(self._notes, hello.get("config"))
        except RhapsodyError as error:
            await stream.send_message(rhapsody=__version__, error=str(error))
            return
        await stream.send_message(rhapsody=__version__, pid=os.getpid(), notes=notes)
        if server is None:
            await ControlServer(self._state, stream).serve()
        else:
            current_folder.set(_client_folder(hello))
            with self._count_client():
                await serve_client(server, stream, stream)

    @contextmanager
    def _count_client(self) -> Iterator[None]:
        """Count one more client within the block. A stop of the service ends the block early."""
        self._state.clients += 1
        with anyio.CancelScope() as scope:
            self._client_scopes.add(scope)
            try:
                yield
            finally:
                self._client_scopes.discard(scope)
                self._state.clients -= 1
                self._note_use()

    def _server(self, settings: Settings) -> Server:
        """One server for all clients with the same tools, because building one takes long."""
        key = (settings.read_only, settings.toolsets)
        if (server := self._servers.get(key)) is None:
            server = build_server(settings, self._sessions, [self._state.tasks], self._state.audit)
            self._servers[key] = server
        return server

    def _notes(self, config: str | None) -> list[str]:
        """Notes for a client whose settings differ from those of the service.

        Raises InvalidSettings where a file that the client named cannot be read."""
        try:
            requested = read_settings(Path(config) if config else None)
        except InvalidSettings as error:
            if config:
                raise
            return [str(error)]
        if not (keys := differing_keys(self._settings, requested)):
            return []
        return [
            f"the running service took its settings when it started; these differ: {keys}. It takes others when "
            f"it starts again: first rhapsody-mcp service stop{self._state.paths.command_option}."
        ]


def _client_folder(hello: dict[str, Any]) -> str:
    """The client's working folder; empty if there is no such folder on this host."""
    folder = str(hello.get("cwd", ""))
    return folder if os.path.isabs(folder) and os.path.isdir(folder) else ""
