"""A minimal worker pool: processes that get calls over a Unix socket and send back each start and each result.

python -m rhapsody_mcp.bench.bare SOCKET
"""

from __future__ import annotations

import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import msgspec

__all__ = ["BareWorkers", "no_op"]

_HEADER = 8
_WINDOW = 64


def no_op(number: int) -> int:
    return number


class BareWorkers:
    """A pool of `count` processes, which end at the end of `with`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._folder = tempfile.TemporaryDirectory(prefix="bare-")

    def __enter__(self) -> Self:
        address = str(Path(self._folder.name, "socket"))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen()
            command = [sys.executable, "-m", "rhapsody_mcp.bench.bare", address]
            self._processes = [subprocess.Popen(command) for _ in range(self._count)]
            self._buffers = {server.accept()[0]: bytearray() for _ in range(self._count)}
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._buffers:
            connection.close()
        self._folder.cleanup()

    def run(self, count: int) -> float:
        """The seconds of `count` calls of `no_op`, from the first send until the last result has arrived."""
        began, code = time.perf_counter(), pickle.dumps(no_op)
        unsent, values = iter(range(count)), dict[int, int]()
        open_calls = dict.fromkeys(self._buffers, 0)

        def send_calls(connection: socket.socket) -> None:
            room = range(_WINDOW - open_calls[connection])
            if calls := [(number, code, pickle.dumps((number,))) for _, number in zip(room, unsent, strict=False)]:
                open_calls[connection] += len(calls)
                _send(connection, calls)

        for connection in self._buffers:
            send_calls(connection)
        while len(values) < count:
            for connection in select.select(list(self._buffers), [], [])[0]:
                for number, value in self._results(connection):
                    values[number] = value
                    open_calls[connection] -= 1
                if open_calls[connection] <= _WINDOW // 2:
                    send_calls(connection)
        return time.perf_counter() - began

    def _results(self, connection: socket.socket) -> Iterator[tuple[int, int]]:
        buffer = self._buffers[connection]
        buffer += connection.recv(1 << 18)
        while len(buffer) >= (end := _HEADER + int.from_bytes(buffer[:_HEADER], "big")) > _HEADER:
            for number, _, value in msgspec.msgpack.decode(bytes(buffer[_HEADER:end])):
                if value is not None:
                    yield number, msgspec.json.decode(value)
            del buffer[:end]


def _send(connection: socket.socket, messages: list[Any]) -> None:
    body = msgspec.msgpack.encode(messages)
    connection.sendall(len(body).to_bytes(_HEADER, "big") + body)


def _frames(stream: BufferedReader) -> Iterator[list[Any]]:
    while header := stream.read(_HEADER):
        yield msgspec.msgpack.decode(stream.read(int.from_bytes(header, "big")))


def main() -> None:
    connection, functions = socket.socket(socket.AF_UNIX), dict[bytes, Callable[..., object]]()
    connection.connect(sys.argv[1])
    for calls in _frames(connection.makefile("rb")):
        replies: list[Any] = []
        for number, code, arguments in calls:
            if code not in functions:
                functions[code] = pickle.loads(code)
            _send(connection, [*replies, (number, time.time(), None)])
            value = functions[code](*pickle.loads(arguments))
            replies = [(number, time.time(), msgspec.json.encode(value))]
        _send(connection, replies)


if __name__ == "__main__":
    main()
