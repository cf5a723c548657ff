"""A small OpenAI-compatible server on loopback whose answers a test decides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Answer = Callable[[str], str]


class Refusal(Exception):
    """Makes the server answer with this status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StandIn:
    """Answers each prompt with `answer(prompt)`, which may raise Refusal, cut at max_tokens. While `gate` is clear,
    it keeps everybody waiting. `bodies` are the requests so far, `at_work` the prompts that it is working on."""

    def __init__(self) -> None:
        self.answer: Answer = lambda prompt: f"answer to {prompt}"
        self.models = ["tiny", "other"]
        self.no_batches: int | None = None
        self.gives_logprobs = True
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_work: list[str] = []
        self.most_at_work = 0
        self.given_up: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed = asyncio.Condition()
        self.url = ""

    @property
    def sizes(self) -> list[int]:
        """How many prompts each request had."""
        return [len(conversations(body)) for body in self.bodies]

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(600), self.changed:
            await self.changed.wait_for(true)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def list_models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        return JSONResponse({"data": [{"id": model} for model in self.models]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        prompts = [conversation[-1]["content"] for conversation in conversations(body)]
        self.bodies.append(body)
        self.at_work += prompts
        self.most_at_work = max(self.most_at_work, len(self.at_work))
        await self.notify()
        try:
            return await self._answered(body, prompts, request)
        finally:
            for prompt in prompts:
                self.at_work.remove(prompt)
            await self.notify()

    async def _answered(self, body: dict[str, Any], prompts: list[str], request: Request) -> Response:
        if self.no_batches is not None and request.url.path.endswith("/batch"):
            return JSONResponse({"detail": "no such address"}, self.no_batches)
        gate, gone = asyncio.create_task(self.gate.wait()), asyncio.create_task(_gone(request))
        await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gate.done():
            gate.cancel()
            self.given_up.append(prompts)
            return Response()
        gone.cancel()
        if body["model"] not in self.models:
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        try:
            texts = [self.answer(prompt) for prompt in prompts]
        except Refusal as refusal:
            return JSONResponse({"error": {"message": str(refusal)}}, refusal.status)
        reply = _completion([text for text in texts for _ in range(body.get("n", 1))], prompts, body.get("max_tokens"))
        if body.get("logprobs") and self.gives_logprobs:
            for choice in reply["choices"]:
                choice["logprobs"] = {"content": [_token(letter, body) for letter in choice["message"]["content"]]}
        return JSONResponse(reply)


def conversations(body: dict[str, Any]) -> list[list[dict[str, str]]]:
    messages: list[Any] = body["messages"]
    return messages if isinstance(messages[0], list) else [messages]


def _completion(texts: list[str], prompts: list[str], most_tokens: int | None) -> dict[str, Any]:
    """A token a character, as the server counts."""
    written = [text[:most_tokens] for text in texts]
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": written[index]},
            "token_ids": list(map(ord, written[index])),
            "finish_reason": "stop" if written[index] == text else "length",
        }
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": sum(map(len, written))}
    return {"choices": choices, "usage": usage}


def _token(letter: str, body: dict[str, Any]) -> dict[str, Any]:
    likely = [{"token": letter, "logprob": -0.5, "bytes": None}, {"token": "?", "logprob": -1.5, "bytes": None}]
    return {**likely[0], "top_logprobs": likely[: body["top_logprobs"]]}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: asyncio.Event) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield  # signals are the test runner's


@contextlib.asynccontextmanager
async def serve(stand_in: StandIn, prefix: str = "/v1") -> AsyncIterator[StandIn]:
    """Serve on a free port until the end of the block; `stand_in.url` is the address."""
    routes = [
        Route(f"{prefix}/models", stand_in.list_models),
        Route(f"{prefix}/chat/completions", stand_in.chat, methods=["POST"]),
        Route(f"{prefix}/chat/completions/batch", stand_in.chat, methods=["POST"]),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off", ws="none")
    started = asyncio.Event()
    server = _Uvicorn(config, started)
    task = asyncio.create_task(server.serve())
    await started.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    stand_in.url = f"http://127.0.0.1:{port}{prefix}"
    try:
        yield stand_in
    finally:
        stand_in.gate.set()
        server.should_exit = server.force_exit = True
        await task
