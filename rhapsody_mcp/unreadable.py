"""Answers messages that cannot be read; the SDK drops them without a word, and whoever sent one would wait for ever."""

from __future__ import annotations

import re
from typing import Any

from anyio.streams.memory import MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp.types import PARSE_ERROR, ErrorData, JSONRPCError
from pydantic import ValidationError

__all__ = ["answer_unreadable"]

_ID = re.compile(r'"id"\s*:\s*("[^"\\]{1,200}"|\d{1,15})\s*[,}]')


async def answer_unreadable(read: Any, readable: MemoryObjectSendStream[SessionMessage], write: Any) -> None:
    """Pass on what a transport has read, and answer what it could not read with JSON-RPC's parse error."""
    async with readable, read:
        async for item in read:
            if isinstance(item, Exception):
                await write.send(SessionMessage(_refusal(item)))
            else:
                await readable.send(item)


def _refusal(error: Exception) -> JSONRPCError:
    found = error.errors(include_url=False) if isinstance(error, ValidationError) else []
    message = found[0]["msg"] if found else str(error)
    line = found[0].get("input") if found else None
    return JSONRPCError(
        jsonrpc="2.0",
        id=_id_in(line) if isinstance(line, str) else None,
        error=ErrorData(code=PARSE_ERROR, message=f"this message cannot be read: {message[:300]}"),
    )


def _id_in(line: str) -> str | int | None:
    """The id of a message that is no valid JSON, where one can be seen."""
    found = _ID.search(line[:2000]) or _ID.search(line[-2000:])
    if found is None:
        return None
    text = found.group(1)
    return text[1:-1] if text.startswith('"') else int(text)
