"""HTTP in odd forms, byte by byte: each is refused in form, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.security.guarded import Guarded, call_body, guarded

BODY = json.dumps(call_body()).encode()
HEADERS = {
    "Host": b"127.0.0.1:PORT",
    "Accept": b"application/json, text/event-stream",
    "Content-Type": b"application/json",
    "Mcp-Protocol-Version": b"2026-07-28",
    "Mcp-Method": b"tools/list",
    "Connection": b"close",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    settings = "http_slow_s: 2\nhttp_requests_per_s: 1000\n"
    with guarded(tmp_path_factory.mktemp("odd"), settings=settings) as server:
        yield server


def request(
    line: bytes = b"POST /mcp HTTP/1.1", body: bytes = BODY, more: tuple[bytes, ...] = (), **headers: bytes | None
) -> bytes:
    """`headers` are in the place of the usual ones, `_` standing for `-`; None leaves one out."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    every = {**HEADERS, "Content-Length": b"%d" % len(body), **given}
    lines = [b"%s: %s" % (name.encode(), value) for name, value in every.items() if value is not None]
    return b"\r\n".join([line, *lines, *more, b"", body])


def status(server: Guarded, sent: bytes) -> int:
    """Of the answer, after which the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=600) as opened:
        heard = b""
        try:
            opened.sendall(sent.replace(b"PORT", b"%d" % server.port))
            while more := opened.recv(65536):
                heard += more
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was answered before all of it had come
    assert b"Traceback" not in heard
    return int(heard.split()[1])


def chunked(body: bytes) -> bytes:
    return request(body=body, Content_Length=None, Transfer_Encoding=b"chunked")


ODD = {
    "GET": (405, request(b"GET /mcp HTTP/1.1", b"")),
    "PUT": (405, request(b"PUT /mcp HTTP/1.1")),
    "DELETE": (405, request(b"DELETE /mcp HTTP/1.1", b"")),
    "OPTIONS": (405, request(b"OPTIONS /mcp HTTP/1.1", b"")),
    "HEAD": (405, request(b"HEAD /mcp HTTP/1.1", b"")),
    "a path that climbs": (404, request(b"POST /mcp/../etc/passwd HTTP/1.1")),
    "no path": (404, request(b"POST * HTTP/1.1")),
    "another server's address": (404, request(b"POST http://evil.example/mcp HTTP/1.1")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n"),
    "the preface of HTTP/2": (404, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "no HTTP": (400, b"\0\xff\xfe hello\r\n\r\n"),
    "no host": (400, request(Host=None)),
    "two hosts": (400, request(more=(b"Host: evil.example",))),
    "another host": (421, request(Host=b"evil.example")),
    "another host in IPv6": (421, request(Host=b"[fe80::1]:PORT")),
    "half an address in IPv6": (421, request(Host=b"[::1")),
    "an empty host": (421, request(Host=b"")),
    "a host behind a user": (421, request(Host=b"127.0.0.1@evil.example")),
    "a host with a dot at its end": (421, request(Host=b"localhost.")),
    "a host that is no text": (421, request(Host=b"\xff\xfe")),
    "the origin of a file": (403, request(Origin=b"null")),
    "half an origin": (403, request(Origin=b"http://[::1")),
    "a negative length": (400, request(Content_Length=b"-1")),
    "a length in words": (400, request(Content_Length=b"ten")),
    "a length of 400 digits": (400, request(Content_Length=b"9" * 400)),
    "two lengths": (400, request(more=(b"Content-Length: 3",))),
    "a length, and chunks that never come": (408, request(Transfer_Encoding=b"chunked")),
    "a chunk of no length": (400, chunked(b"zz\r\nhello\r\n0\r\n\r\n")),
    "a chunk of negative length": (400, chunked(b"-5\r\nhello\r\n0\r\n\r\n")),
    "an unknown encoding": (400, request(Content_Length=None, Transfer_Encoding=b"gzip")),
    "no length and no body": (400, request(body=b"", Content_Length=None)),
    "an empty body": (400, request(body=b"")),
    "a packed body": (400, request(body=b"\x1f\x8b\x08", Content_Encoding=b"gzip")),
    "no type": (400, request(Content_Type=None)),
    "another type": (400, request(Content_Type=b"text/plain")),
    "nothing accepted": (406, request(Accept=None)),
    "a page accepted": (406, request(Accept=b"text/html")),
    "another revision": (400, request(Mcp_Protocol_Version=b"1999-01-01")),
    "two revisions": (400, request(more=(b"Mcp-Protocol-Version: 2025-11-25",))),
    "another method than the body's": (400, request(Mcp_Method=b"tools/call")),
    "a list": (400, request(body=b"[" + BODY + b"]")),
    "an id that is no number": (400, request(body=b'{"jsonrpc":"2.0","id":NaN,"method":"tools/list"}')),
    "a body too deep": (400, request(body=b"[" * 30_000 + b"]" * 30_000)),
    "a long header": (400, request(more=(b"X: " + b"a" * 200_000,))),
    "a header without a value": (400, request(more=(b"nothing",))),
    "a header with a zero byte": (400, request(more=(b"X: a\0b",))),
}
FINE = {
    "the usual": request(),
    "this machine in IPv6": request(Host=b"[::1]:PORT"),
    "a host without a port": request(Host=b"127.0.0.1"),
    "HTTP/1.0": request(b"POST /mcp HTTP/1.0"),
    "many headers": request(more=tuple(b"X-%d: a" % number for number in range(1000))),
    "an offer of another protocol": request(Upgrade=b"websocket"),
    "a body in chunks": chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
}


@pytest.mark.parametrize("form", ODD)
def test_what_is_odd_is_refused_in_form_and_others_are_served(form: str, server: Guarded) -> None:
    right, sent = ODD[form]
    assert status(server, sent) == right
    assert status(server, request()) == 200


@pytest.mark.parametrize("form", FINE)
def test_what_is_unusual_and_right_is_served(form: str, server: Guarded) -> None:
    assert status(server, FINE[form]) == 200
