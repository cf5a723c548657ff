"""What the service does for whoever runs it: it says how it is, listens on HTTP, and ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from rhapsody_mcp import __version__
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks import tasks_text
from rhapsody_mcp.serving.http.listeners import Listener, listen_on_host, listen_on_socket
from rhapsody_mcp.serving.http.server import serve_listener
from rhapsody_mcp.serving.stream_server import Wire
from rhapsody_mcp.settings import Settings

if TYPE_CHECKING:
    from rhapsody_mcp.serving.daemon.service import Service

__all__ = ["obey"]

_log = logging.getLogger(__name__)
_OPEN = (TaskState.RUNNING, TaskState.QUEUED, TaskState.WAITING)


async def obey(service: Service, wire: Wire) -> None:
    """Follow the orders of one connection until it is closed, each a line, each answered by one."""
    while order := await wire.hear():
        match order.get("do"):
            case "status":
                changed = await anyio.to_thread.run_sync(service.settings_changed)
                await wire.tell(**_status(service), settings_changed=changed)
            case "stop":
                await _stop(service, wire, order)
            case "listen":
                await _listen(service, wire, order)
                return
            case unknown:
                await wire.tell(error=f"unknown order {unknown!r}. Valid: status, stop, listen.")


def _status(service: Service) -> dict[str, Any]:
    ledger = service.sessions.ledger
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": round(time.time() - service.started, 1),
        "socket": str(service.places.socket),
        "state": str(service.places.state),
        "connections": service.connections,
        "listeners": service.listeners,
        "settings_file": str(service.settings_file),
        "sessions": _sessions(service),
        "ledger_problem": ledger.problem if ledger else "there is none",
    }


def _sessions(service: Service) -> list[dict[str, Any]]:
    """Each session with how many of its tasks run, are queued and wait, as list_sessions counts them."""
    return [
        {"session": opened.id, **{state.lower(): opened.session.counts.get(state, 0) for state in _OPEN}}
        for opened in service.sessions.all()
    ]


async def _stop(service: Service, wire: Wire, order: dict[str, Any]) -> None:
    """That it has ended is told by the end of the connection."""
    refusal = "" if order.get("force") else _reason_to_stay(service, bool(order.get("if_idle")))
    if refusal:
        await wire.tell(refused=refusal)
        return
    lost = sum(row["running"] for row in _sessions(service))
    _log.info("it was told to stop%s", f" with --force, which loses {tasks_text(lost)}" if lost else "")
    service.held.append(wire.held())
    await wire.tell(stopping=True)
    service.ending.set()


def _reason_to_stay(service: Service, unused: bool) -> str:
    busy = [
        f"{row['session']} ({row['running']} running, {row['queued']} queued, {row['waiting']} waiting)"
        for row in _sessions(service)
        if row["running"] or row["queued"] or row["waiting"]
    ]
    if busy:
        return f"Tasks have not ended in {', '.join(busy[:10])}{', ...' if len(busy) > 10 else ''}."
    if unused and not service.is_idle:
        return f"It has {len(service.sessions.all())} open sessions and {service.connections} other clients."
    return ""


async def _listen(service: Service, wire: Wire, order: dict[str, Any]) -> None:
    """Until the connection is closed, or the service ends. The sessions go on."""
    try:
        settings = service.offer(order["settings"])
        where = order["socket"]
        with listen_on_socket(Path(where)) if where else listen_on_host(order["host"], order["port"]) as listener:
            await _serve(service, wire, listener, settings)
    except RhapsodyError as error:
        await wire.tell(error=str(error))


async def _serve(service: Service, wire: Wire, listener: Listener, settings: Settings) -> None:
    async def end_after(end: Callable[[], Awaitable[None]]) -> None:
        await end()
        stop.set()

    def say(words: str) -> None:
        service.listeners.append(listener.address)
        _log.info("it listens on %s", listener.address)
        group.start_soon(partial(wire.tell, said=words))

    stop, closed = anyio.Event(), anyio.Event()
    service.fronts.add(closed)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(end_after, wire.wait_for_end)
            group.start_soon(end_after, service.ending.wait)
            made = service.sessions, service.tasks
            try:
                await serve_listener(settings, listener, *made, say, stop, service.places, service.audit)
            except RhapsodyError as error:
                await wire.tell(error=str(error))
            group.cancel_scope.cancel()
    finally:
        if listener.address in service.listeners:
            _log.info("it listens no more on %s", listener.address)
        service.listeners = [address for address in service.listeners if address != listener.address]
        service.fronts.discard(closed)
        closed.set()
