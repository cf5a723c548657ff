"""Requires the server's key for all POST requests: vLLM itself requires it only under /v1, but other addresses also run
a model."""

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class KeyForEveryPost:
    """ASGI middleware that answers 401 to a POST request without the key in VLLM_API_KEY."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._expected = _digest(b"Bearer " + os.environ["VLLM_API_KEY"].encode())

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not self._has_key(scope):
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps({"error": "Unauthorized"}).encode()})
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: _Scope) -> bool:
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(_digest(authorization), self._expected)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
