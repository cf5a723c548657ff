"""How long the clients of a session let a call run, and what the waits that they gave up had to show."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from rhapsody_mcp.runtime.call_context import current_client
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.toolsets.replies.formatting import duration

__all__ = ["Patience", "patience_of"]

_CAUTIOUS_S = 4.0
"""The default for clients of which nothing is known: openai-agents, google-adk and Dragon's agents give a call 5 s, and
the reply needs time."""
_NAMES_UNKNOWN = ("", "mcp", "fastmcp", "google-adk")
"""The names of clients that give a call 5 s, or 10 (agno, as "fastmcp"). The SDK's own name, "mcp", stands for many."""
_SHARE_OF_LIMIT = 0.8
_MOST_CLIENTS = 100


@dataclass
class Patience:
    """How long a client lets a call run, as far as its calls in a session have shown."""

    client: str
    limit_s: float = math.inf
    """After how long the client gave up a wait, unless it has taken the reply of a longer one since."""
    _running: dict[int, _Wait] = field(default_factory=dict)
    """The waits whose client is taken to wait for the reply."""
    _unseen: dict[str, int] = field(default_factory=dict)
    """For each filter, how many tasks of the session had ended before a wait that was given up."""
    _has_given_up: bool = False
    """Whether it gave up its last wait."""

    def default_s(self, usual_s: float) -> float:
        """How long a wait lasts that says no time; `usual_s` suits most clients that have a name of their own.

        A long wait that was answered proves nothing: clients of mcp 1 give up a call without a word, and nobody reads
        the reply.
        """
        allowed_s = 0.0 if self.client in _NAMES_UNKNOWN else round(_SHARE_OF_LIMIT * self.limit_s, 1)
        return min(usual_s, max(_CAUTIOUS_S, allowed_s))

    def most_s(self, usual_s: float) -> float:
        """The longest that a wait lasts: right after one that was given up, as long as one that says no time. The model
        may have seen no more of the one before than an error, which invites the same call."""
        return self.default_s(usual_s) if self._has_given_up else math.inf

    @property
    def note(self) -> str:
        """A sentence about a wait that was given up."""
        if math.isinf(self.limit_s):
            return ""
        return f"your client gave up a wait after {duration(self.limit_s)}; without timeout_s a wait takes less"

    def hint(self, usual_s: float) -> str:
        """How the next wait can take longer than one that says no time."""
        if self.default_s(usual_s) >= usual_s or math.isfinite(self.limit_s):
            return ""
        allowed = "if your client lets a call take so long; one that it gives up loses nothing"
        return f"With timeout_s={usual_s:g} it waits longer, {allowed}"

    def unseen(self, key: str) -> int | None:
        """Where the reply to this filter begins, if the client gave up a wait with the filter and has had no reply to
        one since."""
        self._drop_silent()
        return self._unseen.get(key)

    @contextmanager
    def noting_end(self, key: str, since: int, *, is_deferred: bool = False) -> Iterator[None]:
        """Learn from a wait with this filter, which began when `since` tasks had ended.

        A wait that is deferred shows nothing of how long its client waits.
        """
        self._drop_silent()
        number, wait = next(_numbers), _Wait(_now(), key, since)
        self._running |= {} if is_deferred else {number: wait}
        try:
            yield
            if is_deferred or number in self._running:
                self._note_seen(wait)
            if number in self._running:
                self._note_answer(_now() - wait.began)
        except asyncio.CancelledError:
            if not is_deferred:
                self.limit_s, self._has_given_up = _now() - wait.began, True
            self._note_unseen(wait)
            raise
        finally:
            self._running.pop(number, None)

    def _drop_silent(self) -> None:
        """Older clients give up a call without a word: a wait during which the client begins another one proves
        nothing, and its reply may be seen by nobody."""
        for number, wait in list(self._running.items()):
            if _now() - wait.began >= _CAUTIOUS_S:
                del self._running[number]
                self._note_unseen(wait)

    def _note_unseen(self, wait: _Wait) -> None:
        self._unseen[wait.key] = min(wait.since, self._unseen.get(wait.key, wait.since))

    def _note_seen(self, wait: _Wait) -> None:
        if self._unseen.get(wait.key, -1) >= wait.since:
            del self._unseen[wait.key]

    def _note_answer(self, waited_s: float) -> None:
        self._has_given_up = False
        if waited_s > self.limit_s:
            self.limit_s = math.inf


class _Wait(NamedTuple):
    began: float
    key: str
    since: int


def _now() -> float:
    return asyncio.get_running_loop().time()


_numbers = itertools.count()
_by_session: WeakKeyDictionary[OpenSession, dict[str, Patience]] = WeakKeyDictionary()
"""By the name of the client. A client may connect for each call anew, so no server can keep this."""


def patience_of(open_session: OpenSession) -> Patience:
    """The patience that the client of this call has shown in this session."""
    clients, name = _by_session.setdefault(open_session, {}), current_client.get()
    if name not in clients and len(clients) == _MOST_CLIENTS:
        del clients[next(iter(clients))]
    return clients.setdefault(name, Patience(name))
