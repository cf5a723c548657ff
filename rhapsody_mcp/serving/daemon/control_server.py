"""The service's side of the control commands: status, stop, and listen on HTTP."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from rhapsody_mcp import __version__
from rhapsody_mcp.dashboard.archive import write_whole
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.protocol.dashboard import Dashboard
from rhapsody_mcp.runtime.tasks import tasks_text
from rhapsody_mcp.serving.daemon.client_settings import changed_settings, client_settings
from rhapsody_mcp.serving.daemon.state import ServiceState
from rhapsody_mcp.serving.http.listeners import Listener, listen_on_host, listen_on_socket
from rhapsody_mcp.serving.http.server import serve_listener
from rhapsody_mcp.serving.stream_server import LineStream
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.toolsets.output.follow import follow
from rhapsody_mcp.toolsets.output.sources import check_rank

__all__ = ["ControlServer"]

_log = logging.getLogger(__name__)
_OPEN_STATES = (TaskState.RUNNING, TaskState.QUEUED, TaskState.WAITING)


class ControlServer:
    """Executes the commands of one control connection; each command is a line, and so is each reply."""

    def __init__(self, service: ServiceState, stream: LineStream) -> None:
        self._service, self._stream = service, stream

    async def serve(self) -> None:
        """Returns when the connection is closed, or after `listen`."""
        while command := await self._stream.receive_message():
            match command.get("do"):
                case "status":
                    await self._stream.send_message(**await self._status())
                case "stop":
                    await self._stop(command)
                case "listen":
                    await self._listen(command)
                    return
                case "logs":
                    await self._send_logs(command)
                    return
                case "write":
                    await self._write(command)
                case unknown:
                    await self._stream.send_message(
                        error=f"unknown order {unknown!r}. Valid: status, stop, listen, logs, write."
                    )

    async def _status(self) -> dict[str, Any]:
        service = self._service
        ledger = service.sessions.ledger
        changed = await anyio.to_thread.run_sync(changed_settings, service.settings, service.config)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - service.started, 1),
            "socket": str(service.paths.socket),
            "state": str(service.paths.state),
            "connections": service.clients,
            "listeners": service.http_addresses,
            "settings_file": str(service.settings_file),
            "sessions": self._session_rows(),
            "ledger_problem": ledger.problem if ledger else "there is none",
            "settings_changed": changed,
        }

    def _session_rows(self) -> list[dict[str, Any]]:
        """Each session with its counts of running, queued and waiting tasks, as list_sessions counts them."""
        return [
            {"session": opened.id, **{state.lower(): opened.session.counts.get(state, 0) for state in _OPEN_STATES}}
            for opened in self._service.sessions.all()
        ]

    async def _stop(self, command: dict[str, Any]) -> None:
        """Request the service's end. The client learns of the end itself by the end of its connection."""
        refusal = "" if command.get("force") else self._reason_to_refuse(bool(command.get("if_idle")))
        if refusal:
            await self._stream.send_message(refused=refusal)
            return
        lost = sum(row["running"] for row in self._session_rows())
        _log.info("it was told to stop%s", f" with --force, which loses {tasks_text(lost)}" if lost else "")
        self._service.descriptors_until_exit.append(self._stream.duplicate_descriptor())
        await self._stream.send_message(stopping=True)
        self._service.stop_requested.set()

    def _reason_to_refuse(self, only_if_idle: bool) -> str:
        busy = [
            f"{row['session']} ({row['running']} running, {row['queued']} queued, {row['waiting']} waiting)"
            for row in self._session_rows()
            if row["running"] or row["queued"] or row["waiting"]
        ]
        if busy:
            return f"Tasks have not ended in {', '.join(busy[:10])}{', ...' if len(busy) > 10 else ''}."
        if only_if_idle and not self._service.is_idle:
            return (
                f"It has {len(self._service.sessions.all())} open sessions and {self._service.clients} other clients."
            )
        return ""

    async def _send_logs(self, command: dict[str, Any]) -> None:
        """Send what a task prints; with `follow`, until the task has ended, or the connection."""
        try:
            opened = self._service.sessions.get(command["session"])
            task = opened.task(command["task"])
            check_rank(task, command.get("rank"))
        except RhapsodyError as error:
            await self._stream.send_message(error=str(error))
            return
        async with anyio.create_task_group() as group:
            group.start_soon(self._cancel_when_closed, group.cancel_scope)
            lines = follow(opened.session, task, command.get("rank"), until_end=bool(command.get("follow")))
            async for stream, text in lines:
                await self._stream.send_message(stream=stream, text=text)
            await self._stream.send_message(ended=task.state.value if task.state.final else "")
            group.cancel_scope.cancel()

    async def _write(self, command: dict[str, Any]) -> None:
        """Write files of a session, whose paths stand by their kinds."""
        dashboard = Dashboard(self._service.sessions)
        try:
            for what, path in command["files"].items():
                content = await dashboard.file(what, command["session"])
                await anyio.to_thread.run_sync(write_whole, Path(path), content)
            await self._stream.send_message(written=list(command["files"].values()))
        except RhapsodyError as error:
            await self._stream.send_message(error=str(error))
        except OSError as error:
            await self._stream.send_message(error=f"{error.filename} cannot be written: {error.strerror}.")

    async def _cancel_when_closed(self, scope: anyio.CancelScope) -> None:
        await self._stream.wait_for_close()
        scope.cancel()

    async def _listen(self, command: dict[str, Any]) -> None:
        """Serve HTTP until the connection is closed or the service stops. The sessions stay open."""
        try:
            if session := command.get("session"):
                await self._service.sessions.restored.wait()
                self._service.sessions.get(session)
            settings = client_settings(self._service.settings, command["settings"])
            path = command["socket"]
            with listen_on_socket(Path(path)) if path else listen_on_host(command["host"], command["port"]) as listener:
                await self._serve_http(listener, settings)
        except RhapsodyError as error:
            await self._stream.send_message(error=str(error))

    async def _serve_http(self, listener: Listener, settings: Settings) -> None:
        async def stop_after(event: Callable[[], Awaitable[None]]) -> None:
            await event()
            stop.set()

        def say(text: str) -> None:
            service.http_addresses.append(listener.address)
            _log.info("it listens on %s", listener.address)
            group.start_soon(partial(self._stream.send_message, said=text, address=listener.address))

        service = self._service
        stop, closed = anyio.Event(), anyio.Event()
        service.http_closed.add(closed)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(stop_after, self._stream.wait_for_close)
                group.start_soon(stop_after, service.stop_requested.wait)
                shared = service.sessions, service.tasks
                try:
                    await serve_listener(settings, listener, *shared, say, stop, service.paths, service.audit)
                except RhapsodyError as error:
                    await self._stream.send_message(error=str(error))
                group.cancel_scope.cancel()
        finally:
            if listener.address in service.http_addresses:
                _log.info("it listens no more on %s", listener.address)
                service.http_addresses = [address for address in service.http_addresses if address != listener.address]
            service.http_closed.discard(closed)
            closed.set()
