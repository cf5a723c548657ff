"""Numbered messages arrive once and in order, over connections that are lost and processes that are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from rhapsody_mcp.backends.pilot.delivery import Delivery
from rhapsody_mcp.backends.pilot.messages import FromPilot, FromService, Progress, Rest
from rhapsody_mcp.engine.network.multiplexer import Multiplexer

pytestmark = pytest.mark.anyio


class End:
    """One end of a conversation, which settles each message at once, or never. With `drops`, what was meant for a
    process is dropped with the process."""

    def __init__(self, *, settles: bool = True, drops: bool = False) -> None:
        self.received: list[object] = []
        self.delivered: list[object] = []
        self.new_lives = 0
        self.delivery: Delivery[FromPilot | FromService] = Delivery(
            self._receive,
            on_new_life=self._on_new_life,
            on_delivered=self.delivered.append,
        )
        self._settles, self._drops = settles, drops

    def _receive(self, message: FromPilot | FromService, number: int) -> None:
        self.received.append(message)
        if self._settles:
            self.delivery.settle(number)

    def _on_new_life(self) -> None:
        self.new_lives += 1
        if self._drops:
            self.delivery.drop_unacknowledged()


class Wire:
    """A connection in memory, which can be cut."""

    def __init__(self, first: End, second: End) -> None:
        self.ends = [self._multiplexer(is_server) for is_server in (True, False)]
        for end, transport in zip(self.ends, (_Pipe(self, 1), _Pipe(self, 0)), strict=True):
            end.connection_made(transport)
        first.delivery.connect(self.ends[0])
        second.delivery.connect(self.ends[1])

    @staticmethod
    def _multiplexer(is_server: bool) -> Multiplexer:
        return Multiplexer(is_server=is_server, open_stream=lambda stream, kind: None)

    def cut(self) -> None:
        for end in self.ends:
            end.connection_lost(None)


class _Pipe(asyncio.Transport):
    def __init__(self, wire: Wire, other: int) -> None:
        super().__init__()
        self._wire, self._other = wire, other

    def write(self, data: bytes | bytearray | memoryview) -> None:
        asyncio.get_running_loop().call_soon(self._wire.ends[self._other].data_received, bytes(data))

    def abort(self) -> None: ...

    def close(self) -> None: ...


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it gives way to the callbacks of the event loop
            await asyncio.sleep(0)


def order(number: int) -> Rest:
    return Rest(f"backend {number}")


async def test_messages_that_were_sent_without_a_connection_come_with_the_next_one() -> None:
    service, pilot = End(), End()
    service.delivery.send(order(1))
    service.delivery.send(order(2))
    wire = Wire(service, pilot)
    await until(lambda: len(pilot.received) == 2 and not service.delivery.unacknowledged)
    wire.cut()
    pilot.delivery.send(Progress("b", "ready"))
    service.delivery.send(order(3))
    assert not service.received
    Wire(service, pilot)
    await until(lambda: len(pilot.received) == 3 and len(service.received) == 1)
    assert pilot.received == [order(1), order(2), order(3)]
    assert service.received == [Progress("b", "ready")]


async def test_a_message_that_was_received_and_not_settled_comes_once_to_the_same_process() -> None:
    service, pilot = End(settles=False), End()
    wire = Wire(service, pilot)
    pilot.delivery.send(Progress("b", "starting"))
    await until(lambda: len(service.received) == 1)
    wire.cut()
    Wire(service, pilot)
    pilot.delivery.send(Progress("b", "ready"))
    await until(lambda: len(service.received) == 2)
    assert service.received == [Progress("b", "starting"), Progress("b", "ready")]
    assert len(pilot.delivery.unacknowledged) == 2 and not pilot.delivered
    service.delivery.settle(1)
    await until(lambda: pilot.delivered == [Progress("b", "starting")])


async def test_a_new_process_gets_all_that_the_one_before_had_not_settled() -> None:
    first, pilot = End(settles=False), End()
    wire = Wire(first, pilot)
    pilot.delivery.send(Progress("b", "starting"))
    await until(lambda: len(first.received) == 1)
    wire.cut()
    second = End()
    second.delivery.send(order(1))
    Wire(second, pilot)
    await until(lambda: len(second.received) == 1 and len(pilot.received) == 1)
    assert second.received == [Progress("b", "starting")] and pilot.received == [order(1)]
    assert (pilot.new_lives, second.new_lives) == (1, 0)
    await until(lambda: not pilot.delivery.unacknowledged)


async def test_orders_for_a_process_that_is_gone_are_not_sent_to_the_next() -> None:
    service, first = End(drops=True), End(settles=False)
    wire = Wire(service, first)
    service.delivery.send(order(1))
    await until(lambda: len(first.received) == 1)
    wire.cut()
    second = End()
    Wire(service, second)
    await until(lambda: service.new_lives == 1)
    service.delivery.send(order(2))
    await until(lambda: len(second.received) == 1)
    assert second.received == [order(2)]
