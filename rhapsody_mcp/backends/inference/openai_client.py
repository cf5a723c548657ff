"""An HTTP client for an OpenAI-compatible server."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import httpx2
import msgspec

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.model.outcome import Usage

__all__ = ["Answer", "ChatServer", "Conversation", "RequestRefused", "ServerLost", "WrittenText"]

Conversation = list[dict[str, str]]

_CONNECT_S = 10.0
_LIST_MODELS_S = 30.0  # only the list of models has a time limit: an answer may take any time
_KEEPALIVE_S = 2.0  # servers close idle connections after some seconds; the client must do so first


_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


class RequestRefused(Exception):
    """The server replied with an error: `status` is the HTTP status, the text is the server's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerLost(Exception):
    """The server cannot be reached, or ended the connection without a reply."""


class WrittenText(msgspec.Struct, frozen=True):
    """A text that the model wrote. `cut` says whether the text ended at the token limit.

    `logprobs` are the tokens of the text; None where they were not requested.
    """

    text: str
    cut: bool
    logprobs: list[Token] | None = None


class Answer(msgspec.Struct, frozen=True):
    """The answer to one conversation: one text, or as many as the parameter `n` requests."""

    written: tuple[WrittenText, ...]
    usage: Usage | None


class ChatServer:
    """A client of the server whose API, with `models` and `chat/completions`, is below `url`. Close it after use.

    `models` are the names of the models that the server serves; empty before `ask_models`.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises InvalidSettings where `url` is no HTTP address."""
        self.url = url.rstrip("/")
        self.models: tuple[str, ...] = ()
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            limits=httpx2.Limits(keepalive_expiry=_KEEPALIVE_S),
            trust_env=_host_of(url) not in _THIS_MACHINE,  # a proxy cannot reach this machine's loopback
        )

    async def ask_models(self) -> Self:
        """Request the names of the models. Raises RequestRefused or ServerLost."""
        listing = _decode(await self._request("GET", "models"), _Models)
        self.models = tuple(model.id for model in listing.data)
        return self

    async def complete(self, parameters: dict[str, Any], conversations: Sequence[Conversation]) -> list[Answer]:
        """The answers to these conversations, in order, from one request, which succeeds or fails as a whole.

        On cancellation the connection is closed, and vLLM then ends its work. Raises RequestRefused or ServerLost.
        """
        if len(conversations) == 1:
            body = {**parameters, "messages": conversations[0]}
            reply = _decode(await self._request("POST", "chat/completions", body), _Reply)
        else:
            body = {**parameters, "messages": conversations, "return_token_ids": True}
            reply = _decode(await self._request("POST", "chat/completions/batch", body), _Reply)
        wanted = len(conversations) * parameters.get("n", 1)
        if len(reply.choices) != wanted:
            raise RequestRefused(200, f"the server gave {len(reply.choices)} answers where {wanted} were asked for")
        return _answers(reply, conversations)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        timeout = httpx2.Timeout(_LIST_MODELS_S if body is None else None, connect=_CONNECT_S)
        began = time.monotonic()
        try:
            response = await self._client.request(method, path, content=content, headers=headers, timeout=timeout)
        except httpx2.HTTPError as error:
            after = f" after {time.monotonic() - began:.0f} s" if body is not None else ""
            raise ServerLost(f"no answer from {self.url}{after}: {str(error) or type(error).__name__}") from error
        if not response.is_success:
            raise RequestRefused(response.status_code, _error_message(response))
        return response

    async def close(self) -> None:
        await self._client.aclose()


def _host_of(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidSettings(f'url is {url!r}; valid is one such as "http://127.0.0.1:8000/v1".')
    return parsed.host


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Message(msgspec.Struct):
    content: str | None = None


class TokenLogprob(msgspec.Struct):
    """A token, with the natural logarithm of its probability."""

    token: str
    logprob: float


class Token(TokenLogprob):
    """A token of the text, with the likeliest tokens in its place, which may include the token itself."""

    top_logprobs: list[TokenLogprob] = []


class _Logprobs(msgspec.Struct):
    content: list[Token] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    logprobs: _Logprobs | None = None
    index: int = 0
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Reply(msgspec.Struct):
    choices: list[_Choice]
    usage: _Tokens | None = None


_T = TypeVar("_T")


def _decode(response: httpx2.Response, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        message = f"{response.url} answers, but not as an OpenAI-compatible server does: {error}"
        raise RequestRefused(response.status_code, message) from error


def _answers(reply: _Reply, conversations: Sequence[Conversation]) -> list[Answer]:
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    written = [
        WrittenText(
            choice.message.content or "",
            choice.finish_reason == "length",
            choice.logprobs.content if choice.logprobs else None,
        )
        for choice in choices
    ]
    if len(conversations) == 1:
        tokens = reply.usage
        usage = Usage(tokens.prompt_tokens, tokens.completion_tokens or 0) if tokens else None
        return [Answer(tuple(written), usage)]
    usages = _usage_of_each(reply.usage, choices, conversations) if reply.usage else [None] * len(choices)
    return [Answer((one,), usage) for one, usage in zip(written, usages, strict=True)]


def _usage_of_each(total: _Tokens, choices: list[_Choice], conversations: Sequence[Conversation]) -> list[Usage]:
    """The token counts of each conversation.

    The server counts a batch as a whole, and lists only the tokens of its answers; so the tokens of the prompts are
    distributed in proportion to the prompts' lengths.
    """
    lengths = [sum(len(message["content"]) for message in conversation) for conversation in conversations]
    prompts = _split_total(total.prompt_tokens, lengths)
    written = [None if choice.token_ids is None else len(choice.token_ids) for choice in choices]
    shared = _split_total(total.completion_tokens or 0, [len(choice.message.content or "") for choice in choices])
    return [
        Usage(prompt, share if count is None else count)
        for prompt, count, share in zip(prompts, written, shared, strict=True)
    ]


def _split_total(total: int, weights: list[int]) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights; their sum is `total`."""
    shares, so_far, given = [], 0, 0
    whole = sum(weights) + len(weights)
    for weight in weights:
        so_far += weight + 1
        upto = round(total * so_far / whole)
        shares.append(upto - given)
        given = upto
    return shares


def _error_message(response: httpx2.Response) -> str:
    """The server's error message; servers put it under different keys."""
    try:
        body = json.loads(response.content)
    except ValueError:
        body = response.text[:500]
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), json.dumps(body)[:500])
    text = body if isinstance(body, str) and body.strip() else json.dumps(body)
    return f"{text.strip()[:2000]} (HTTP {response.status_code} from {response.url.host})"
