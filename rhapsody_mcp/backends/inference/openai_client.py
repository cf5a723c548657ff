"""Speaks to one OpenAI-compatible server over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import httpx2
import msgspec

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.model.outcome import Usage

__all__ = ["Answer", "ChatServer", "Conversation", "Lost", "Refused", "Written"]

Conversation = list[dict[str, str]]

_CONNECT_S = 10.0
_LISTING_S = 30.0  # answers may take any time, a list of models may not
_IDLE_S = 2.0  # servers close a connection that was idle for some seconds; a request must not meet that moment


_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):
    """The server answered, with an error: `status` is HTTP's, the text is the server's own message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Lost(Exception):
    """The server is gone or cannot be reached; what it would have answered is not known."""


class Written(msgspec.Struct, frozen=True):
    """What the model wrote; `cut` where it reached the most tokens that it might write. `logprobs` are its tokens, if
    they were asked for."""

    text: str
    cut: bool
    logprobs: list[Token] | None = None


class Answer(msgspec.Struct, frozen=True):
    """What the model wrote to one conversation: one text, or as many as were asked for."""

    written: tuple[Written, ...]
    usage: Usage | None


class ChatServer:
    """A server, by the address under which it has `models` and `chat/completions`. Close it after use.

    `models` are the names that it serves, once `ask_models` has ended.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises InvalidSettings for what is no address."""
        self.url = url.rstrip("/")
        self.models: tuple[str, ...] = ()
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            limits=httpx2.Limits(keepalive_expiry=_IDLE_S),
            trust_env=_host(url) not in _THIS_MACHINE,  # where a proxy cannot reach it
        )

    async def ask_models(self) -> Self:
        """Ask which models it serves. Raises Refused or Lost."""
        listing = _read(await self._request("GET", "models"), _Models)
        self.models = tuple(model.id for model in listing.data)
        return self

    async def complete(self, parameters: dict[str, Any], conversations: Sequence[Conversation]) -> list[Answer]:
        """Answer these conversations, in order; several go as one request, which ends well or fails as a whole.

        Cancelling this closes the connection, upon which vLLM ends the work. Raises Refused or Lost.
        """
        if len(conversations) == 1:
            body = {**parameters, "messages": conversations[0]}
            reply = _read(await self._request("POST", "chat/completions", body), _Reply)
        else:
            body = {**parameters, "messages": conversations, "return_token_ids": True}
            reply = _read(await self._request("POST", "chat/completions/batch", body), _Reply)
        wanted = len(conversations) * parameters.get("n", 1)
        if len(reply.choices) != wanted:
            raise Refused(200, f"the server gave {len(reply.choices)} answers where {wanted} were asked for")
        return _answers(reply, conversations)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        timeout = httpx2.Timeout(_LISTING_S if body is None else None, connect=_CONNECT_S)
        began = time.monotonic()
        try:
            response = await self._client.request(method, path, content=content, headers=headers, timeout=timeout)
        except httpx2.HTTPError as error:
            after = f" after {time.monotonic() - began:.0f} s" if body is not None else ""
            raise Lost(f"no answer from {self.url}{after}: {str(error) or type(error).__name__}") from error
        if not response.is_success:
            raise Refused(response.status_code, _message(response))
        return response

    async def close(self) -> None:
        await self._client.aclose()


def _host(url: str) -> str:
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


class Likely(msgspec.Struct):
    """A token, with the natural logarithm of its probability."""

    token: str
    logprob: float


class Token(Likely):
    """A token that was written, with those that were the likeliest in its place, itself often among them."""

    top_logprobs: list[Likely] = []


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


def _read(response: httpx2.Response, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        message = f"{response.url} answers, but not as an OpenAI-compatible server does: {error}"
        raise Refused(response.status_code, message) from error


def _answers(reply: _Reply, conversations: Sequence[Conversation]) -> list[Answer]:
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    written = [
        Written(
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
    usages = _usages(reply.usage, choices, conversations) if reply.usage else [None] * len(choices)
    return [Answer((one,), usage) for one, usage in zip(written, usages, strict=True)]


def _usages(total: _Tokens, choices: list[_Choice], conversations: Sequence[Conversation]) -> list[Usage]:
    """Each conversation's tokens. The server counts a batch as a whole and lists only what it wrote: the prompts'
    tokens are shared out by length."""
    lengths = [sum(len(message["content"]) for message in conversation) for conversation in conversations]
    prompts = _shares(total.prompt_tokens, lengths)
    written = [None if choice.token_ids is None else len(choice.token_ids) for choice in choices]
    shared = _shares(total.completion_tokens or 0, [len(choice.message.content or "") for choice in choices])
    return [
        Usage(prompt, share if count is None else count)
        for prompt, count, share in zip(prompts, written, shared, strict=True)
    ]


def _shares(total: int, weights: list[int]) -> list[int]:
    """`total` in whole parts that are as the weights and sum up to it."""
    shares, so_far, given = [], 0, 0
    whole = sum(weights) + len(weights)
    for weight in weights:
        so_far += weight + 1
        upto = round(total * so_far / whole)
        shares.append(upto - given)
        given = upto
    return shares


def _message(response: httpx2.Response) -> str:
    """The server's own words, from whichever place a server puts them."""
    try:
        body = json.loads(response.content)
    except ValueError:
        body = response.text[:500]
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), json.dumps(body)[:500])
    text = body if isinstance(body, str) and body.strip() else json.dumps(body)
    return f"{text.strip()[:2000]} (HTTP {response.status_code} from {response.url.host})"
