"""Sends prompts to servers: those with the same parameters that wait at the same time go out together."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from rhapsody_mcp.backends.inference.openai_client import Answer, ChatServer, Conversation, Lost, Refused
from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["Limits", "Prompt", "PromptBatcher", "read_limits"]

_EXCHANGES = 8  # batches of the same parameters that one server works on: it joins them, and they end one by one
_NO_SUCH_ADDRESS = (404, 405, 501)


class Limits(msgspec.Struct, frozen=True):
    """`batch` is the most prompts in one request, `at_once` the most that one server has at a time, and `requests` the
    most requests, unless a prompt has waited too long. A prompt for which a server has room waits `wait_s` at most, for
    others to go with."""

    batch: int = 32
    at_once: int = 1024
    wait_s: float = 0.5
    requests: int = 32


def read_limits(max_batch_size: int, wait_s: float, *, batches: bool = True, our_own: bool = False) -> Limits:
    """The limits that a backend's user gives; without `batches`, every prompt is a request of its own. A server that is
    `our_own` gets as many requests as prompts.

    Raises InvalidSettings.
    """
    if not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise InvalidSettings(f"max_batch_size is {max_batch_size!r}; valid is a whole number of at least 1.")
    if not 0 <= wait_s < math.inf:
        raise InvalidSettings(f"max_batch_wait_ms is {wait_s * 1000:g}; valid is a number of at least 0.")
    batch = min(max_batch_size, Limits().batch) if batches else 1
    return Limits(batch, max_batch_size, wait_s, max_batch_size if our_own else Limits().requests)


class Prompt:
    """A conversation on its way to a server. `answer` ends with an Answer, or raises Refused or Lost.

    `parameters` is what all of a batch has in common; `group` keeps apart prompts that shall not share a batch although
    their parameters are the same. `sent` is called when it goes out, also when it goes out again.
    """

    def __init__(
        self, conversation: Conversation, parameters: dict[str, Any], group: bytes, sent: Callable[[], None]
    ) -> None:
        self.conversation, self.parameters, self.group, self.sent = conversation, parameters, group, sent
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.since = asyncio.get_running_loop().time()
        self.alone = parameters.get("n", 1) > 1  # a batch takes one answer a prompt
        self.waiting = True
        self.exchange: asyncio.Task[list[Answer]] | None = None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.group, id(self) if self.alone else 0

    @property
    def has_failed(self) -> bool:
        return self.answer.done() and not self.answer.cancelled() and self.answer.exception() is not None

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # whoever awaits it still gets it; unawaited, it is no news


class PromptBatcher:
    """Shares prompts out among servers, the least busy first.

    A prompt goes out at once where a server has few requests that are like it. Otherwise it waits until one of them
    ends, or until `limits.wait_s` are over, and then takes along what is like it. A batch that fails is sent again one
    by one, so that a bad prompt fails alone; so is everything, to a server that takes no batches.
    """

    def __init__(self, servers: Iterable[ChatServer], limits: Limits) -> None:
        self._loads = [_ServerLoad(server) for server in servers]
        self._limits = limits
        self._queue: deque[Prompt] = deque()
        self._alike: dict[tuple[bytes, int], deque[Prompt]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._exchanges: set[asyncio.Task[list[Answer]]] = set()

    def ask(self, prompts: Sequence[Prompt]) -> None:
        """Take these prompts; those that are asked in the same turn of the event loop can go together."""
        for prompt in prompts:
            self._queue.append(prompt)
            self._alike.setdefault(prompt.key, deque()).append(prompt)
        asyncio.get_running_loop().call_soon(self._pump)

    async def withdraw(self, prompts: Iterable[Prompt]) -> None:
        """Give up on these prompts, and return when no server works on them: the request that a prompt is part of
        is ended, and what else was in it is sent again."""
        exchanges = set()
        for prompt in prompts:
            prompt.waiting = False
            prompt.answer.cancel()
            if prompt.exchange is not None and not prompt.exchange.done():
                exchanges.add(prompt.exchange)
                prompt.exchange.cancel()
        if exchanges:
            await asyncio.wait(exchanges)

    def lose(self, server: ChatServer, message: str) -> None:
        """This server is gone, with what it was working on; what waits goes to the others, if there are any."""
        for load in self._loads:
            if load.server is server and load.lost is None:
                load.lost = Lost(message)
                for task in load.exchanges:
                    task.cancel()
        self._pump()

    def gain(self, server: ChatServer) -> None:
        """One more server, in place of one that was lost where there is one."""
        self._loads = [*(load for load in self._loads if load.lost is None), _ServerLoad(server)]
        self._pump()

    async def close(self) -> None:
        """Give up on everything."""
        for load in self._loads:
            load.lost = load.lost or Lost("the backend was closed")
        self._pump()
        for task in self._exchanges:
            task.cancel()
        if self._exchanges:
            await asyncio.wait(self._exchanges)

    # --- sending

    def _pump(self) -> None:
        """Send what can be sent now, and see to it that the rest is looked at again in time."""
        while (oldest := self._oldest()) is not None:
            now = asyncio.get_running_loop().time()
            due = oldest.since + self._limits.wait_s
            open_loads = [load for load in self._loads if load.lost is None]
            if not open_loads:
                self._give_up()
            elif free := [load for load in open_loads if load.has_room(oldest.group, self._limits, overdue=due <= now)]:
                load = min(free, key=lambda load: load.prompts)
                self._send(load, self._batch(oldest, load))
            else:
                if due > now:
                    self._wake_at(due)
                return

    def _oldest(self) -> Prompt | None:
        while self._queue and not self._queue[0].waiting:
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def _batch(self, oldest: Prompt, load: _ServerLoad) -> list[Prompt]:
        """The prompts to send with this one, itself included."""
        most = min(self._limits.batch, self._limits.at_once - load.prompts) if load.takes_batches else 1
        alike = self._alike[oldest.key]
        batch: list[Prompt] = []
        while alike and len(batch) < most:
            prompt = alike.popleft()
            if prompt.waiting:
                batch.append(prompt)
                prompt.waiting = False
        if not alike:
            del self._alike[oldest.key]
        return batch

    def _send(self, load: _ServerLoad, batch: list[Prompt]) -> None:
        conversations = [prompt.conversation for prompt in batch]
        task = asyncio.create_task(load.server.complete(batch[0].parameters, conversations))
        self._exchanges.add(task)
        load.exchanges.add(task)
        load.exchanges_by_group[batch[0].group] += 1
        load.prompts += len(batch)
        for prompt in batch:
            prompt.exchange = task
            prompt.sent()
        task.add_done_callback(partial(self._exchanged, load, batch))

    def _wake_at(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._pump)

    def _give_up(self) -> None:
        """No server is left: fail everything that waits."""
        while (prompt := self._oldest()) is not None:
            prompt.waiting = False
            prompt.fail(self._loads[0].lost or Lost("the backend has no server"))
        self._alike.clear()

    # --- what comes back

    def _exchanged(self, load: _ServerLoad, batch: list[Prompt], task: asyncio.Task[list[Answer]]) -> None:
        self._exchanges.discard(task)
        load.exchanges.discard(task)
        load.exchanges_by_group -= Counter([batch[0].group])
        load.prompts -= len(batch)
        if task.cancelled():
            if load.lost is not None:
                _fail(batch, load.lost)
        elif (error := task.exception()) is None:
            for prompt, answer in zip(batch, task.result(), strict=True):
                if not prompt.answer.done():
                    prompt.answer.set_result(answer)
        elif isinstance(error, Refused) and len(batch) > 1:
            self._split(load, batch, error)
        else:
            _fail(batch, error if isinstance(error, Exception) else Lost(str(error)))
        self._send_again([prompt for prompt in batch if not prompt.answer.done()])
        self._pump()

    def _split(self, load: _ServerLoad, batch: list[Prompt], refusal: Refused) -> None:
        """A batch was refused: its prompts go again one by one. 404 may also speak of the model."""
        served = batch[0].parameters.get("model") in load.server.models
        if refusal.status in _NO_SUCH_ADDRESS and (refusal.status != 404 or served):
            load.takes_batches = False
        for prompt in batch:
            prompt.alone = True

    def _send_again(self, prompts: list[Prompt]) -> None:
        """Put prompts back to the head of the queue."""
        for prompt in reversed(prompts):
            prompt.waiting = True
            self._queue.appendleft(prompt)
            self._alike.setdefault(prompt.key, deque()).appendleft(prompt)


class _ServerLoad:
    """A server with what it has to do. `lost` says why it takes nothing any more."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        self.exchanges: set[asyncio.Task[list[Answer]]] = set()
        self.prompts = 0
        self.exchanges_by_group: Counter[bytes] = Counter()
        """How many exchanges it works on, by the group of their prompts."""
        self.takes_batches = True
        self.lost: Lost | None = None

    def has_room(self, group: bytes, limits: Limits, *, overdue: bool) -> bool:
        gathers = self.takes_batches and limits.batch > 1 and self.exchanges_by_group[group] >= _EXCHANGES
        quiet = len(self.exchanges) < limits.requests and not gathers
        return self.prompts < limits.at_once and (quiet or overdue)


def _fail(batch: list[Prompt], error: Exception) -> None:
    for prompt in batch:
        prompt.fail(error)
