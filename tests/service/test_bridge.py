"""The bridge between stdin and stdout and the service, before one that is scripted."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import rhapsody_mcp
from rhapsody_mcp.serving.daemon.unix_listener import UnixListener
from tests.services import OwnService, own_service

Script = Callable[[socket.socket, dict[str, Any]], None]
REQUEST = {"jsonrpc": "2.0", "id": 7, "method": "initialize", "params": {}}


@pytest.fixture
def stage() -> Iterator[OwnService]:
    """Where a scripted service is found."""
    with own_service() as service:
        yield service


@contextmanager
def playing(stage: OwnService, script: Script, version: str = rhapsody_mcp.__version__) -> Iterator[None]:
    """A service that greets each caller, and then does what the script says of a connection and its hello."""

    def play() -> None:
        while True:
            try:
                caller, _ = listener.socket.accept()
            except OSError:
                return
            with suppress(ConnectionError), caller, caller.makefile("rb") as heard:
                hello = json.loads(heard.readline())
                caller.sendall(json.dumps({"rhapsody": version, "pid": 1, "notes": ["a note"]}).encode() + b"\n")
                script(caller, hello)

    with UnixListener(stage.paths) as listener:
        listener.socket.setblocking(True)
        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield
        finally:
            listener.socket.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def wait_for(event: threading.Event) -> None:
    event.wait(60)


def bridge(stage: OwnService, said: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(stage.command("stdio"), input=said, capture_output=True, timeout=600, check=False)


def test_ten_megabytes_pass_whole_in_both_directions_and_what_was_said_last_is_answered(stage: OwnService) -> None:
    sent = os.urandom(10_000_000)
    heard, last = hashlib.sha256(), bytearray()

    def script(caller: socket.socket, hello: dict[str, Any]) -> None:
        left = len(sent)
        while left and (part := caller.recv(min(left, 1 << 16))):
            heard.update(part)
            left -= len(part)
        caller.sendall(sent[::-1])
        while part := caller.recv(1 << 16):
            last.extend(part)
        caller.sendall(b"the last answer")

    def say(running: subprocess.Popen[bytes]) -> None:
        assert running.stdin
        running.stdin.write(sent)
        running.stdin.flush()

    with (
        playing(stage, script),
        subprocess.Popen(stage.command("stdio"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running,
    ):
        assert running.stdin and running.stdout
        saying = threading.Thread(target=say, args=[running])
        saying.start()
        answered = running.stdout.read(len(sent))
        saying.join()
        running.stdin.write(b"the last words")
        running.stdin.close()
        assert running.stdout.read() == b"the last answer"
    assert running.returncode == 0
    assert heard.digest() == hashlib.sha256(sent).digest()
    assert answered == sent[::-1] and last == b"the last words"


def test_the_end_of_stdin_ends_it_before_a_service_that_says_nothing(stage: OwnService) -> None:
    done = threading.Event()
    with playing(stage, lambda caller, hello: wait_for(done)):
        ran = bridge(stage, b"{}\n")
        done.set()
    assert ran.returncode == 0, ran.stderr


def test_the_end_of_stdin_ends_it_before_a_service_that_takes_nothing(stage: OwnService) -> None:
    """What the client sent fills every buffer on the way, and the bridge cannot read to its end."""
    done = threading.Event()
    with (
        playing(stage, lambda caller, hello: wait_for(done)),
        subprocess.Popen(stage.command("stdio"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as running,
    ):
        assert running.stdin
        os.set_blocking(running.stdin.fileno(), False)
        full = 0
        while full < 20:
            try:
                os.write(running.stdin.fileno(), bytes(1 << 16))
                full = 0
            except BlockingIOError:
                full += 1
                done.wait(0.02)
        running.stdin.close()
        assert running.wait(30) == 0
        done.set()


def test_notes_of_the_service_are_said_to_the_user(stage: OwnService) -> None:
    with playing(stage, lambda caller, hello: None):
        assert b"a note" in bridge(stage, b"{}\n").stderr


def refused(stage: OwnService) -> str:
    """What a client and its user are told, in the same words, by a bridge that cannot serve."""
    ran = bridge(stage, json.dumps(REQUEST).encode() + b"\n")
    assert ran.returncode == 1, ran.stderr
    answer = json.loads(ran.stdout)
    assert answer["id"] == REQUEST["id"]
    words = str(answer["error"]["message"])
    assert f"rhapsody-mcp: {words}\n" in ran.stderr.decode()
    return words


def test_a_service_of_a_later_version_is_reported(stage: OwnService) -> None:
    with playing(stage, lambda caller, hello: None, "99.1.0"):
        words = refused(stage)
    assert "is version 99.1.0, and this is version" in words
    assert f"rhapsody-mcp service stop --folder {stage.folder}, then connect again" in words


def test_a_service_of_an_earlier_version_that_is_used_is_reported_with_what_runs_there(stage: OwnService) -> None:
    def script(caller: socket.socket, hello: dict[str, Any]) -> None:
        if hello["as"] == "control":
            command = json.loads(caller.makefile("rb").readline())
            assert command == {"do": "stop", "if_idle": True}
            caller.sendall(b'{"refused": "Tasks have not ended in sweep (3 running, 2 waiting)."}\n')

    with playing(stage, script, "0.0.1"):
        assert "version 0.0.1, and this is" in (words := refused(stage))
    assert "sweep (3 running, 2 waiting)" in words


def test_a_service_of_an_earlier_version_that_nobody_uses_is_replaced(own: OwnService, tmp_path: Path) -> None:
    told = tmp_path / "rhapsody_mcp-0.0.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: rhapsody-mcp\nVersion: 0.0.1\n")
    own.environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert own.run("service", "start").returncode == 0
    old = own.status()
    own.environment = {}
    assert old["version"] == "0.0.1"
    assert own.run("service", "start").returncode == 0
    new = own.status()
    assert new["version"] == rhapsody_mcp.__version__ and new["pid"] != old["pid"]


def test_the_socket_of_another_user_is_refused(stage: OwnService) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to another user")
    with playing(stage, lambda caller, hello: None):
        os.chown(stage.paths.socket, 12345, -1)
        words = refused(stage)
        os.chown(stage.paths.socket, 0, -1)
    assert "belongs to another user (uid 12345)" in words


def test_a_folder_in_which_others_can_write_is_refused(stage: OwnService) -> None:
    stage.folder.chmod(0o777)
    assert "others can write in the folder" in refused(stage)
    stage.folder.chmod(0o700)


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    assert "Name a shorter --folder" in refused(OwnService(folder))


def test_nothing_heavy_is_loaded_for_it() -> None:
    code = (
        "import sys, rhapsody_mcp.serving.stdio.bridge\n"
        "print([name for name in ('mcp', 'pydantic', 'anyio', 'asyncio', 'yaml') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
