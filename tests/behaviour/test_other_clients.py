"""Clients that are not ours go the whole way, each a program, before the server as people start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviour.test_http import serving
from tests.services import OwnService, own_service

AGENTS_PYTHON = os.environ.get("RHAPSODY_AGENTS_PYTHON")

needs_agents_python = pytest.mark.skipif(
    not AGENTS_PYTHON,
    reason="RHAPSODY_AGENTS_PYTHON names no Python with dragonhpc and a fastmcp below 4, which cannot be in this one",
)


@pytest.fixture(scope="module")
def service() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest, service: OwnService) -> Iterator[list[str]]:
    """What a client is told: a command to start, or the address of a server that runs."""
    if request.param == "stdio":
        yield service.command("stdio")
        return
    with serving("--port", "0", service=service) as (_, address):
        yield [address]


def arrive(python: str, program: str, *arguments: str) -> str:
    """What the program prints last."""
    command = [python, "-m", f"tests.clients.{program}", *arguments]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_client_of_fastmcp_arrives_in_both_eras(server: list[str], mode: str) -> None:
    assert arrive(sys.executable, "fastmcp_journey", "--mode", mode, *server).endswith("arrived")


@needs_agents_python
def test_the_client_of_fastmcp_3_arrives(server: list[str]) -> None:
    assert AGENTS_PYTHON and arrive(AGENTS_PYTHON, "fastmcp_journey", *server).startswith("fastmcp 3.")


@needs_agents_python
def test_an_agent_of_dragon_arrives_with_five_seconds_a_call(service: OwnService) -> None:
    with serving("--port", "0", service=service) as (_, address):
        assert AGENTS_PYTHON and arrive(AGENTS_PYTHON, "dragon_agent_journey", address) == "Dragon's agent arrived"
