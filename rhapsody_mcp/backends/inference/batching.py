"""Sends prompts to servers; waiting prompts with the same parameters share a request."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from rhapsody_mcp.backends.inference.openai_client import Answer, ChatServer, Conversation, RequestRefused, ServerLost
from rhapsody_mcp.backends.priority_queue import PriorityQueue
from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["Limits", "Prompt", "PromptBatcher", "read_limits"]

_EXCHANGES_PER_GROUP = 8  # open requests of one group on a server, which runs all their prompts together
_NO_SUCH_ADDRESS = (404, 405, 501)


class Limits(msgspec.Struct, frozen=True):
    """Bounds for each server.

    `batch` is the most prompts in one request, `at_once` the most prompts that a server has at a time, and `requests`
    the most requests, which a prompt that has waited `wait_s` may exceed. A prompt that a server has room for waits
    `wait_s` seconds at most for other prompts to share its request.
    """

    batch: int = 32
    at_once: int = 1024
    wait_s: float = 0.5
    requests: int = 32


def read_limits(max_batch_size: int, wait_s: float, *, batches: bool = True, our_own: bool = False) -> Limits:
    """Make limits of a backend's arguments. Without `batches`, each prompt is sent as a request of its own.

    With `our_own`, for a server that this package started, the number of requests is bounded like that of prompts.
    Raises InvalidSettings where an argument is out of range.
    """
    if not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise InvalidSettings(f"max_batch_size is {max_batch_size!r}; valid is a whole number of at least 1.")
    if not 0 <= wait_s < math.inf:
        raise InvalidSettings(f"max_batch_wait_ms is {wait_s * 1000:g}; valid is a number of at least 0.")
    batch = min(max_batch_size, Limits().batch) if batches else 1
    return Limits(batch, max_batch_size, wait_s, max_batch_size if our_own else Limits().requests)


class Prompt:
    """A conversation that waits for a server or for its answer. `answer` gives an Answer, or raises RequestRefused
    or ServerLost.

    Prompts share a request only where their `group` is the same; then their `parameters` must be the same too. `sent`
    is called each time that the prompt is sent to a server.
    """

    def __init__(
        self,
        conversation: Conversation,
        parameters: dict[str, Any],
        group: bytes,
        sent: Callable[[], None],
        priority: int = 0,
    ) -> None:
        self.priority = priority
        self.conversation, self.parameters, self.group, self.sent = conversation, parameters, group, sent
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.queued_at = asyncio.get_running_loop().time()
        self.alone = parameters.get("n", 1) > 1  # the batch API gives one answer for each prompt
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
            self.answer.exception()  # so asyncio does not log it where nobody awaits the answer


class PromptBatcher:
    """Distributes prompts among servers; each request goes to the server with the fewest prompts.

    Of waiting prompts, those of the highest priority come first, then the oldest. A prompt is sent at once where a
    server has few requests of the prompt's group. Otherwise the prompt waits until one of these requests ends, or for
    `limits.wait_s` seconds, and is then sent in one request with waiting prompts of its group. After a refused batch
    its prompts are sent one by one, so that a bad prompt fails alone. A server without the batch API gets every prompt
    in a request of its own.
    """

    def __init__(self, servers: Iterable[ChatServer], limits: Limits) -> None:
        self._loads = [_ServerLoad(server) for server in servers]
        self._limits = limits
        self._queue: PriorityQueue[Prompt] = PriorityQueue()
        self._queues_by_key: dict[tuple[bytes, int], PriorityQueue[Prompt]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._exchanges: set[asyncio.Task[list[Answer]]] = set()

    def ask(self, prompts: Sequence[Prompt]) -> None:
        """Queue these prompts; prompts that are queued in the same turn of the event loop can share a request."""
        for prompt in prompts:
            self._queue.append(prompt)
            self._queues_by_key.setdefault(prompt.key, PriorityQueue()).append(prompt)
        asyncio.get_running_loop().call_soon(self._send_waiting)

    def prioritize(self, prompts: Collection[Prompt], priority: int) -> None:
        """Give these prompts, as far as they wait, another priority."""
        waiting = {prompt for prompt in prompts if prompt.waiting}
        queues = [self._queues_by_key[key] for key in {prompt.key for prompt in waiting} & self._queues_by_key.keys()]
        for queue in (self._queue, *queues):
            queue.move(waiting.__contains__, lambda _: priority)

    async def withdraw(self, prompts: Iterable[Prompt]) -> None:
        """Cancel these prompts; return when no server works on them.

        The request of such a prompt is closed, and the other prompts of that request are sent again.
        """
        exchanges = set()
        for prompt in prompts:
            prompt.waiting = False
            prompt.answer.cancel()
            if prompt.exchange is not None and not prompt.exchange.done():
                exchanges.add(prompt.exchange)
                prompt.exchange.cancel()
        if exchanges:
            await asyncio.wait(exchanges)

    def remove_server(self, server: ChatServer, message: str) -> None:
        """Fail the prompts of this server, which is gone, and send it no others.

        Waiting prompts go to the other servers, and fail where there is none.
        """
        for load in self._loads:
            if load.server is server and load.lost is None:
                load.lost = ServerLost(message)
                for task in load.exchanges:
                    task.cancel()
        self._send_waiting()

    def add_server(self, server: ChatServer) -> None:
        """Send prompts to this server too; forget the servers that were lost."""
        self._loads = [*(load for load in self._loads if load.lost is None), _ServerLoad(server)]
        self._send_waiting()

    async def close(self) -> None:
        """Fail every prompt; return when no request is open."""
        for load in self._loads:
            load.lost = load.lost or ServerLost("the backend was closed")
        self._send_waiting()
        for task in self._exchanges:
            task.cancel()
        if self._exchanges:
            await asyncio.wait(self._exchanges)

    # --- sending

    def _send_waiting(self) -> None:
        """Send the prompts that can be sent now; look again when the oldest of the others has waited long enough."""
        while (oldest := self._oldest()) is not None:
            now = asyncio.get_running_loop().time()
            due = oldest.queued_at + self._limits.wait_s
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
        """Take the prompts for one request from the queue: the oldest, and others of its group."""
        max_prompts = min(self._limits.batch, self._limits.at_once - load.prompts) if load.takes_batches else 1
        queue = self._queues_by_key[oldest.key]
        batch: list[Prompt] = []
        while queue and len(batch) < max_prompts:
            prompt = queue.popleft()
            if prompt.waiting:
                batch.append(prompt)
                prompt.waiting = False
        if not queue:
            del self._queues_by_key[oldest.key]
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
        task.add_done_callback(partial(self._on_exchange_end, load, batch))

    def _wake_at(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._send_waiting)

    def _give_up(self) -> None:
        """Fail every waiting prompt, because no server is left."""
        while (prompt := self._oldest()) is not None:
            prompt.waiting = False
            prompt.fail(self._loads[0].lost or ServerLost("the backend has no server"))
        self._queues_by_key.clear()

    # --- what comes back

    def _on_exchange_end(self, load: _ServerLoad, batch: list[Prompt], task: asyncio.Task[list[Answer]]) -> None:
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
        elif isinstance(error, RequestRefused) and len(batch) > 1:
            self._split_batch(load, batch, error)
        else:
            _fail(batch, error if isinstance(error, Exception) else ServerLost(str(error)))
        self._send_again([prompt for prompt in batch if not prompt.answer.done()])
        self._send_waiting()

    def _split_batch(self, load: _ServerLoad, batch: list[Prompt], refusal: RequestRefused) -> None:
        """Have the prompts of a refused batch sent one by one.

        Where the server has no batch API, it gets no more batches; a 404 says so only where the server has the model.
        """
        served = batch[0].parameters.get("model") in load.server.models
        if refusal.status in _NO_SUCH_ADDRESS and (refusal.status != 404 or served):
            load.takes_batches = False
        for prompt in batch:
            prompt.alone = True

    def _send_again(self, prompts: list[Prompt]) -> None:
        """Put prompts back at the head of the queue."""
        for prompt in reversed(prompts):
            prompt.waiting = True
            self._queue.appendleft(prompt)
            self._queues_by_key.setdefault(prompt.key, PriorityQueue()).appendleft(prompt)


class _ServerLoad:
    """A server with its open requests. `lost` says why the server takes no more prompts; None while it does."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        self.exchanges: set[asyncio.Task[list[Answer]]] = set()
        self.prompts = 0
        self.exchanges_by_group: Counter[bytes] = Counter()
        """The number of open requests, by the group of their prompts."""
        self.takes_batches = True
        self.lost: ServerLost | None = None

    def has_room(self, group: bytes, limits: Limits, *, overdue: bool) -> bool:
        gathers = self.takes_batches and limits.batch > 1 and self.exchanges_by_group[group] >= _EXCHANGES_PER_GROUP
        quiet = len(self.exchanges) < limits.requests and not gathers
        return self.prompts < limits.at_once and (quiet or overdue)


def _fail(batch: list[Prompt], error: Exception) -> None:
    for prompt in batch:
        prompt.fail(error)
