"""Answers unreadable messages. The SDK drops them, and their senders would wait without end."""

from __future__ import annotations

import re
from typing import Any

from anyio.streams.memory import MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp.types import PARSE_ERROR, ErrorData, JSONRPCError
from pydantic import ValidationError

__all__ = ["EXCERPT_BYTES", "SHORTEN_ADVICE", "answer_unreadable", "oversized_line"]

EXCERPT_BYTES = 2000
"""The beginning and the end of a message, each of this length, are searched for its id."""
SHORTEN_ADVICE = "Submit fewer tasks at once, and put large data into files."
_OVERSIZED = "\0too long\0"
_ID = re.compile(r'"id"\s*:\s*("[^"\\]{1,200}"|\d{1,15})\s*[,}]')


def oversized_line(begin: bytes, end: bytes, max_bytes: int) -> str:
    """The line that stands for a dropped message of more than `max_bytes`; `answer_unreadable` recognizes it."""
    excerpt = b" ... ".join((begin[:EXCERPT_BYTES], end[-EXCERPT_BYTES:])).decode(errors="replace")
    return f"{_OVERSIZED}{max_bytes}{_OVERSIZED}{excerpt}"


async def answer_unreadable(read: Any, readable: MemoryObjectSendStream[SessionMessage], write: Any) -> None:
    """Pass on the messages that a transport has read, and answer the unreadable ones with JSON-RPC's parse error."""
    async with readable, read:
        async for item in read:
            if not isinstance(item, Exception):
                await readable.send(item)
            elif line := _unreadable_line(item):
                await write.send(SessionMessage(_refusal(item, line)))


def _unreadable_line(error: Exception) -> str:
    """The line, as far as the error has it; empty for an empty line, which is no message."""
    problems = error.errors(include_url=False) if isinstance(error, ValidationError) else []
    return str(problems[0]["input"]).strip() if problems else str(error)


def _refusal(error: Exception, line: str) -> JSONRPCError:
    if line.startswith(_OVERSIZED):
        _, max_bytes, line = line.split(_OVERSIZED, 2)
        reason = f"it is longer than {max_bytes} bytes (setting request_bytes). {SHORTEN_ADVICE}"
    else:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    data = ErrorData(code=PARSE_ERROR, message=f"this message cannot be read: {reason[:300]}")
    return JSONRPCError(jsonrpc="2.0", id=_find_id(line), error=data)


def _find_id(line: str) -> str | int | None:
    """The id in a message that is no valid JSON, if one can be found."""
    match = _ID.search(line[:EXCERPT_BYTES]) or _ID.search(line[-EXCERPT_BYTES:])
    if match is None:
        return None
    text = match.group(1)
    return text[1:-1] if text.startswith('"') else int(text)
