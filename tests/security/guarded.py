"""A server over HTTP as a process, with tokens and an audit log of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx2

from rhapsody_mcp.serving.http.tokens import TokenFile
from rhapsody_mcp.serving.paths import ServicePaths

__all__ = ["OTHER_USER", "Guarded", "as_another_user", "call_body", "guarded", "name_of"]

OTHER_USER = 54321
"""A uid that nobody has."""
_INFO = "io.modelcontextprotocol"


class Guarded:
    """`said` is what the process wrote to its terminal so far, without the address."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        assert process.stdout
        self.address = process.stdout.readline().strip().removeprefix("Listening on ")
        self.state = folder / "rhapsody-mcp" / ServicePaths().host
        self.tokens = TokenFile(self.state / "tokens.json")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2].partition("/")[0])

    def post(self, body: dict[str, Any], token: str | None = None, **headers: str) -> httpx2.Response:
        """A request of the revision 2026-07-28."""
        told = {"Authorization": f"Bearer {token}"} if token else {}
        name = {"Mcp-Name": body["params"]["name"]} if body["method"] == "tools/call" else {}
        sent = {
            "Accept": "application/json, text/event-stream",
            "Mcp-Protocol-Version": "2026-07-28",
            "Mcp-Method": body["method"],
            **name,
            **told,
            **headers,
        }
        return httpx2.post(self.address, json=body, headers=sent, timeout=30)

    def audit(self, **wanted: Any) -> list[dict[str, Any]]:
        """The entries that have these values, once the process has ended."""
        assert self.process.poll() is not None
        lines = (self.state / "audit.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [cast(dict[str, Any], json.loads(line)) for line in lines]
        return [entry for entry in entries if wanted.items() <= entry.items()]

    def end(self) -> str:
        """Ask it to end, and give what it has said since."""
        assert self.process.stdout
        self.process.send_signal(signal.SIGTERM)
        said = self.process.stdout.read()
        assert self.process.wait(30) == 0
        return said


def call_body(method: str = "tools/list", name: str | None = None, **arguments: Any) -> dict[str, Any]:
    meta = {
        f"{_INFO}/protocolVersion": "2026-07-28",
        f"{_INFO}/clientInfo": {"name": "test", "version": "1"},
        f"{_INFO}/clientCapabilities": {},
    }
    params: dict[str, Any] = {"_meta": meta} if name is None else {"name": name, "arguments": arguments, "_meta": meta}
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def name_of(response: httpx2.Response) -> set[str]:
    """The tools that a list of tools names."""
    return {tool["name"] for tool in response.json()["result"]["tools"]}


@contextmanager
def guarded(folder: Path, *arguments: str, settings: str = "") -> Iterator[Guarded]:
    file = folder / "settings.yaml"
    file.write_text(settings or "{}")
    command = [sys.executable, "-m", "rhapsody_mcp", "http", "--in-process", "--port", "0", "--config", str(file)]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder)}
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield Guarded(folder, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def as_another_user(*command: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user who has nothing here. A test that cannot do so fails: it would show nothing."""
    assert os.geteuid() == 0, "root alone can be another user: run this test as root"
    user = str(OTHER_USER)
    changed = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *command]
    return subprocess.run(changed, capture_output=True, text=True, timeout=600, check=False, cwd="/")
