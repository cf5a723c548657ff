"""The tools that open, list and close sessions."""

from __future__ import annotations

from typing import Annotated

from mcp.types import CallToolResult
from pydantic import Field

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.vllm_config import Device
from rhapsody_mcp.runtime.open_sessions import OpenSession, OpenSessions
from rhapsody_mcp.runtime.opening import BackendName, Wanted
from rhapsody_mcp.toolsets.replies import Reply, counts_text, reply

__all__ = ["SessionId", "Sessions"]

SessionId = Annotated[str, Field(description='The session, as create_session named it, e.g. "session-1".')]


class BackendRow(Reply):
    name: str
    runs: list[str]


class Created(Reply):
    session: str
    backends: list[BackendRow]


class SessionRow(Reply):
    session: str
    backends: list[str]
    counts: dict[str, int]


class SessionList(Reply):
    sessions: list[SessionRow]


class Closed(Reply):
    session: str
    counts: dict[str, int]
    canceled: Annotated[int, Field(description="Tasks that had not ended.")]


class Sessions:
    def __init__(self, sessions: OpenSessions) -> None:
        self._sessions = sessions

    async def create_session(
        self,
        name: Annotated[
            str | None,
            Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$", description='Its id; default is "session-1", and so on.'),
        ] = None,
        backends: Annotated[
            list[BackendName] | None,
            Field(min_length=1, description='What runs its tasks, e.g. ["dragon", "vllm"]; the first is the default.'),
        ] = None,
        num_workers: Annotated[
            int | None, Field(ge=1, description="Worker processes for functions; default is one a core.")
        ] = None,
        model: Annotated[
            str | None,
            Field(
                description='Model for vllm: a folder, a hub name such as "Qwen/Qwen2.5-0.5B-Instruct", or "shipped".'
            ),
        ] = None,
        device: Annotated[
            Device | None, Field(description="Where vllm runs its model; default is a GPU if any.")
        ] = None,
        config_file: Annotated[
            str | None, Field(description='YAML file that describes the vllm server, e.g. "/home/me/config.yaml".')
        ] = None,
        endpoint_url: Annotated[
            str | None,
            Field(description='OpenAI-compatible server for prompts, e.g. "http://127.0.0.1:8000/v1".'),
        ] = None,
        endpoint_model: Annotated[str | None, Field(description="A model that this server serves.")] = None,
    ) -> Annotated[CallToolResult, Created]:
        wanted = Wanted(
            backends=tuple(backends or ()),
            num_workers=num_workers,
            model=model,
            device=device,
            config_file=config_file,
            endpoint_url=endpoint_url,
            endpoint_model=endpoint_model,
        )
        opened = self._sessions.open(wanted, name)
        rows = [_backend_row(backend) for backend in opened.session.backends]
        return reply(_created_text(opened.id, rows), Created(session=opened.id, backends=rows))

    async def list_sessions(self) -> Annotated[CallToolResult, SessionList]:
        rows = [_session_row(opened) for opened in self._sessions.all()]
        lines = [f"{row.session} ({', '.join(row.backends)}): {counts_text(row.counts)}" for row in rows]
        return reply("\n".join(lines) or "No session is open: call create_session.", SessionList(sessions=rows))

    async def close_session(self, session: SessionId) -> Annotated[CallToolResult, Closed]:
        running = [task for task in self._sessions.get(session).session.tasks if not task.state.final]
        closed = await self._sessions.close(session)
        counts = closed.session.get_statistics()["counts"]
        text = f"{session} is closed and nothing of it is running: {counts_text(counts)}. Its results are deleted."
        return reply(text, Closed(session=session, counts=counts, canceled=len(running)))


def _backend_row(backend: Backend) -> BackendRow:
    return BackendRow(name=backend.name, runs=sorted(backend.kinds))


def _session_row(opened: OpenSession) -> SessionRow:
    names = [backend.name for backend in opened.session.backends]
    return SessionRow(session=opened.id, backends=names, counts=opened.session.get_statistics()["counts"])


def _created_text(id: str, rows: list[BackendRow]) -> str:
    lines = [f"{id} is open. Engines start with the first task that needs them."]
    lines += [f"- {row.name} runs {', '.join(row.runs)} tasks" for row in rows]
    if not any("prompt" in row.runs for row in rows):
        lines.append("- prompts are refused: no backend of this session answers them (see describe_system)")
    return "\n".join([*lines, f'Next: submit_tasks(session="{id}", tasks=[...]).'])
