"""The MCP conformance suite and the Inspector, against the real server. They run where their packages are."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import OwnService, own_service

PACKAGES = os.environ.get("RHAPSODY_NODE_PACKAGES")
pytestmark = pytest.mark.skipif(
    PACKAGES is None,
    reason="the suite and the Inspector are programs for Node 22; .ci/run installs them and says where they are",
)
ROOT = Path(__file__).parents[2]
MODULES = Path(PACKAGES or "") / "node_modules"
SUITE = ["node", str(MODULES / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"), "server"]
INSPECTOR = ["node", str(MODULES / ".bin" / "mcp-inspector"), "--cli"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.conformance"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28", None], ids=str)
def test_the_suite_passes_in_each_revision_and_in_the_extensions(version: str | None, address: str) -> None:
    chosen = ["--spec-version", version] if version else []  # without it, each scenario in its own revision
    ran = run([*SUITE, "--url", address, "--suite", "all", *chosen])
    assert ran.returncode == 0, ran.stdout
    (passed,) = re.findall(r"^Total: (\d+) passed, 0 failed", ran.stdout, re.M)
    assert int(passed) > 75


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_finds_no_fault_in_the_list_of_tools(
    transport: str, service: OwnService, own_address: str, tmp_path: Path
) -> None:
    server = service.command("stdio")
    reached = server if transport == "stdio" else [own_address, "--transport", "http"]
    ran = run([*INSPECTOR, *reached, "--method", "tools/list", "--strict"], HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '"name": "submit_tasks"' in ran.stdout


@pytest.fixture(scope="module")
def service() -> Iterator[OwnService]:
    """The server as it is, without what the suite needs."""
    with own_service() as service:
        yield service


@pytest.fixture(scope="module")
def own_address(service: OwnService) -> Iterator[str]:
    command = service.command("http", "--port", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout
        yield server.stdout.readline().removeprefix("Listening on ").strip()
        server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **environment, "NO_COLOR": "1"}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600, check=False)
