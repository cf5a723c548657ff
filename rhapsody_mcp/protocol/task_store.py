"""Handles of calls that were answered before they ended: what came of each, for its owner, until it expires."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import DropHandles, HandleRow, PutHandle

__all__ = ["Handle", "HandleStore", "HandlesInLedger", "HandlesInMemory", "Status"]

Status = Literal["working", "input_required", "completed", "failed", "cancelled"]


class Handle(BaseModel):
    """A call as the Tasks extension of MCP shows it, where it is named a task."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)

    task_id: str
    owner: str | None
    """Who made the call: the only one who is told of it. None for everybody who needs no token."""
    status: Status = "working"
    status_message: str | None = None
    created_at: datetime
    last_updated_at: datetime
    ttl_ms: int
    """It expires so long after `created_at`."""
    poll_interval_ms: int = 1000
    input_requests: dict[str, Any] | None = None
    """What it waits to be told, where its status is input_required."""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def expires_at(self) -> datetime:
        return self.created_at + timedelta(milliseconds=self.ttl_ms)

    def wire(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"owner"})


class HandleStore(Protocol):
    """Keeps handles; it knows nothing of the calls that are in progress."""

    def put(self, handle: Handle) -> None:
        """Keep it, in the place of an earlier one with its id. `get` finds it from then on."""

    def get(self, task_id: str) -> Handle | None: ...

    def count(self, owner: str | None) -> int:
        """How many are kept for this owner."""
        ...

    def drop_expired(self, now: datetime) -> None: ...


class HandlesInMemory:
    """A HandleStore that ends with the process."""

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


class HandlesInLedger(HandlesInMemory):
    """A HandleStore that the next life of the service reads again with `load`."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    async def load(self) -> None:
        """Have the handles of the earlier life. A call that was working then has failed."""
        now = datetime.now(UTC)
        for row in await self._ledger.handles():
            handle = Handle.model_validate_json(row.data)
            if handle.status in ("working", "input_required"):
                fields = {"status": "failed", "status_message": _ENDED, "error": {"code": _INTERNAL, "message": _ENDED}}
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


_INTERNAL = -32603  # JSON-RPC's internal error
_ENDED = "The service ended while this call was working, and has started again since. Call the tool again."
