"""Answers messages that cannot be read; the SDK drops them without a word, and whoever sent one would wait for ever."""

from __future__ import annotations

import re
from typing import Any

from anyio.streams.memory import MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from mcp.types import PARSE_ERROR, ErrorData, JSONRPCError
from pydantic import ValidationError

__all__ = ["ENDS", "SHORTER", "answer_unreadable", "cut_line"]

ENDS = 2000
"""So much of the beginning and of the end of a message is looked at for its id."""
SHORTER = "Submit fewer tasks at once, and put large data into files."
_TOO_LONG = "\0too long\0"
_ID = re.compile(r'"id"\s*:\s*("[^"\\]{1,200}"|\d{1,15})\s*[,}]')


def cut_line(begin: bytes, end: bytes, longest: int) -> str:
    """What stands for a message of more than `longest` bytes, of which the rest was thrown away: it is answered."""
    seen = b" ... ".join((begin[:ENDS], end[-ENDS:])).decode(errors="replace")
    return f"{_TOO_LONG}{longest}{_TOO_LONG}{seen}"


async def answer_unreadable(read: Any, readable: MemoryObjectSendStream[SessionMessage], write: Any) -> None:
    """Pass on what a transport has read, and answer what it could not read with JSON-RPC's parse error."""
    async with readable, read:
        async for item in read:
            if not isinstance(item, Exception):
                await readable.send(item)
            elif line := _line_of(item):
                await write.send(SessionMessage(_refusal(item, line)))


def _line_of(error: Exception) -> str:
    """What could not be read, as far as the error has it; empty for an empty line, which is no message."""
    found = error.errors(include_url=False) if isinstance(error, ValidationError) else []
    return str(found[0]["input"]).strip() if found else str(error)


def _refusal(error: Exception, line: str) -> JSONRPCError:
    if line.startswith(_TOO_LONG):
        _, longest, line = line.split(_TOO_LONG, 2)
        why = f"it is longer than {longest} bytes (setting request_bytes). {SHORTER}"
    else:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    told = ErrorData(code=PARSE_ERROR, message=f"this message cannot be read: {why[:300]}")
    return JSONRPCError(jsonrpc="2.0", id=_id_in(line), error=told)


def _id_in(line: str) -> str | int | None:
    """The id of a message that is no valid JSON, where one can be seen."""
    found = _ID.search(line[:ENDS]) or _ID.search(line[-ENDS:])
    if found is None:
        return None
    text = found.group(1)
    return text[1:-1] if text.startswith('"') else int(text)
