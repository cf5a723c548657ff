"""The backend that sends prompts to an OpenAI-compatible server which runs already."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rhapsody_mcp.backends.base import BackendBase, Kind, Report
from rhapsody_mcp.backends.inference.batching import read_limits
from rhapsody_mcp.backends.inference.openai_client import ChatServer, RequestRefused, ServerLost
from rhapsody_mcp.backends.inference.prompt_runner import Defaults, PromptRunner, check_prompts
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.values import Reader

__all__ = ["EndpointInferenceBackend"]


class EndpointInferenceBackend(BackendBase):
    """Sends prompts to the server at a URL; no process is started."""

    kinds: tuple[Kind, ...] = ("prompt",)

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        name: str = "endpoint",
        max_batch_size: int = 256,
        max_batch_wait_ms: int = 500,
    ) -> None:
        """`url` is the base URL of the API, as in "http://host:8000/v1"; `model` is by default the first model that the
        server lists.

        The server has at most `max_batch_size` prompts at a time. A prompt that the server could take waits at most
        `max_batch_wait_ms` for others to share a request with.
        """
        self.name = name
        self._url, self._model, self._api_key = url, model, api_key
        self._limits = read_limits(max_batch_size, max_batch_wait_ms / 1000)
        self._lock = asyncio.Lock()
        self._server: ChatServer | None = None
        self._runner: PromptRunner | None = None

    @property
    def progress(self) -> str:
        if self._closing is not None:
            return "closed"
        return "not started" if self._runner is None else "ready"

    def describe(self) -> dict[str, Any]:
        url = self._server.url if self._server else self._url
        models = list(self._server.models) if self._server else []
        return {"backend": self.name, "progress": self.progress, "url": url, "model": self._model, "models": models}

    def check(self, spec: TaskSpec) -> None:
        check_prompts(spec)

    async def start(self) -> None:
        async with self._lock:
            if self._closing is not None:
                raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
            if self._runner is None:
                server = await self._find_server()
                self._model = self._model or server.models[0]
                self._server = server
                self._runner = PromptRunner([server], Defaults(self._model), self._limits)

    async def _find_server(self) -> ChatServer:
        """The server at the URL, or at /v1 below the URL: the first address that lists its models.

        Raises InvalidSettings where neither does, and BackendUnavailable where no server answers.
        """
        try:
            return await self._open_server(self._url)
        except RequestRefused as refusal:
            if refusal.status in (401, 403):
                raise InvalidSettings(f"{self._url} wants another api_key: {refusal}.") from refusal
            first = refusal
        except ServerLost as lost:
            raise BackendUnavailable(f"{lost}. Look whether the server runs, and whether the url is right.") from lost
        try:
            return await self._open_server(f"{self._url.rstrip('/')}/v1")
        except (RequestRefused, ServerLost):
            raise InvalidSettings(
                f"{self._url} is no OpenAI-compatible server: {first}. Give the address that has /models below it."
            ) from first

    async def _open_server(self, url: str) -> ChatServer:
        server = ChatServer(url, self._api_key)
        try:
            await server.ask_models()
            if not server.models and self._model is None:
                raise InvalidSettings(f"{url} lists no models; name one: model=...")
        except BaseException:
            await server.close()
            raise
        return server

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        assert self._runner is not None, "a session starts a backend before it submits"
        self._runner.submit(task_runs, report, read)

    def cancel(self, uids: Collection[str]) -> None:
        if self._runner is not None:
            self._runner.cancel(uids)

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        if self._runner is not None:
            self._runner.prioritize(priorities)

    async def _close(self) -> None:
        async with self._lock:
            if self._runner is not None and self._server is not None:
                await self._runner.close()
                await self._server.close()
