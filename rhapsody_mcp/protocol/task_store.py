"""Stores the handles of calls that were answered before they ended."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import DropHandles, HandleRow, PutHandle

__all__ = ["Handle", "HandleStore", "InMemoryHandleStore", "LedgerHandleStore", "Status"]

Status = Literal["working", "input_required", "completed", "failed", "cancelled"]


class Handle(BaseModel):
    """A deferred call, which MCP's Tasks extension names a task."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)

    task_id: str
    owner: str | None
    """The caller, who alone may read the handle; None for all callers without a token."""
    status: Status = "working"
    status_message: str | None = None
    created_at: datetime
    last_updated_at: datetime
    ttl_ms: int
    """The handle expires this long after `created_at`."""
    poll_interval_ms: int = 1000
    input_requests: dict[str, Any] | None = None
    """The questions that await answers, while the status is input_required."""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def expires_at(self) -> datetime:
        return self.created_at + timedelta(milliseconds=self.ttl_ms)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"owner"})


class HandleStore(Protocol):
    """Keeps handles, and knows nothing of calls in progress."""

    def put(self, handle: Handle) -> None:
        """Store a handle; replaces one with the same id. `get` finds the handle at once."""

    def get(self, task_id: str) -> Handle | None: ...

    def count(self, owner: str | None) -> int:
        """How many handles this owner has."""
        ...

    def drop_expired(self, now: datetime) -> None: ...


class InMemoryHandleStore:
    """A HandleStore in memory."""

    def __init__(self) -> None:
        self._handles: dict[str, Handle] = {}

    def put(self, handle: Handle) -> None:
        self._handles[handle.task_id] = handle

    def get(self, task_id: str) -> Handle | None:
        return self._handles.get(task_id)

    def count(self, owner: str | None) -> int:
        return sum(handle.owner == owner for handle in self._handles.values())

    def drop_expired(self, now: datetime) -> None:
        self._handles = {id: handle for id, handle in self._handles.items() if handle.expires_at > now}


class LedgerHandleStore(InMemoryHandleStore):
    """A HandleStore that a restarted service reads again with `load`."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    async def load(self) -> None:
        """Read the handles of the ledger. Calls that were in progress when the service ended become failed."""
        now = datetime.now(UTC)
        for row in await self._ledger.handles():
            handle = Handle.model_validate_json(row.data)
            if handle.status in ("working", "input_required"):
                fields = {
                    "status": "failed",
                    "status_message": _SERVICE_ENDED,
                    "error": {"code": _INTERNAL_ERROR, "message": _SERVICE_ENDED},
                }
                self.put(handle.model_copy(update={**fields, "input_requests": None, "last_updated_at": now}))
            else:
                super().put(handle)
        self.drop_expired(now)

    def put(self, handle: Handle) -> None:
        super().put(handle)
        data = handle.model_dump_json().encode()
        self._ledger.write(PutHandle(HandleRow(handle.task_id, data, handle.expires_at.timestamp())))

    def drop_expired(self, now: datetime) -> None:
        before = len(self._handles)
        super().drop_expired(now)
        if len(self._handles) < before:
            self._ledger.write(DropHandles(now.timestamp()))


_INTERNAL_ERROR = -32603  # JSON-RPC's internal error
_SERVICE_ENDED = "The service ended while this call was working, and has started again since. Call the tool again."
