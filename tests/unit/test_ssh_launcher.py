"""Commands on several hosts at once, with a stand-in for ssh."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rhapsody_mcp.backends.compute.nodes.steps import step_on
from rhapsody_mcp.engine.process.tree import living
from tests.processes import wait_until
from tests.ssh_stand_in import SshStandIn

pytestmark = pytest.mark.anyio

WAITS = 'trap "echo >$NOTES/ended-$$; exit 7" TERM; echo >$NOTES/running-$$; sleep 1000 & wait'
"""Writes files with its process id: a step has the variables of the caller, and not those of its host."""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshStandIn:
    monkeypatch.setenv("NOTES", str(tmp_path))
    return SshStandIn(tmp_path, monkeypatch, "n1", "n2")


def start(script: str, *, hosts: Sequence[str] = ("me@n1", "n2"), parent: str = "") -> subprocess.Popen[str]:
    command = step_on(hosts, ["/bin/sh", "-c", script])
    if parent:
        command = [sys.executable, "-c", parent, *command]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def noted(folder: Path, what: str) -> set[int]:
    return {int(file.name.removeprefix(f"{what}-")) for file in folder.glob(f"{what}-*")}


async def running(folder: Path) -> set[int]:
    """The processes of the steps, once both run."""
    await wait_until(lambda: len(noted(folder, "running")) == 2, 30)
    return noted(folder, "running")


def test_the_environment_goes_to_the_hosts_and_no_command_line_shows_it(
    ssh: SshStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "a 'b'\nc")
    with start('printf "%s" "$SECRET_KEY" | wc -l; pwd >&2; mkdir "$NOTES/one" 2>/dev/null || exit 5') as step:
        _, said = step.communicate(timeout=30)
    assert step.returncode == 5
    assert sorted(said.splitlines()) == ["me@n1: /", "me@n1: 1", "n2: /", "n2: 1"]
    shown = "".join((ssh.host(name) / "ssh-arguments").read_text() for name in ("n1", "n2"))
    assert "SECRET" not in shown and "wc -l" not in shown and "BatchMode=yes" in shown


async def test_term_ends_the_command_on_all_hosts(ssh: SshStandIn, tmp_path: Path) -> None:
    with start(WAITS) as step:
        pids = await running(tmp_path)
        step.send_signal(signal.SIGTERM)
        assert step.wait(30) == 7
    assert noted(tmp_path, "ended") == pids
    assert not living(pids)


@pytest.mark.parametrize("whose", ["launcher", "parent"])
async def test_a_death_ends_the_command_on_all_hosts(ssh: SshStandIn, tmp_path: Path, whose: str) -> None:
    parent = "import subprocess, sys; subprocess.run(sys.argv[1:])" if whose == "parent" else ""
    with start(WAITS, parent=parent) as step:
        pids = await running(tmp_path)
        step.kill()
        await wait_until(lambda: noted(tmp_path, "ended") == pids, 30)
        await wait_until(lambda: not living(pids), 30)


async def test_the_host_itself_needs_no_ssh(ssh: SshStandIn, tmp_path: Path) -> None:
    with start(WAITS, hosts=[socket.gethostname(), "n2"]) as step:
        pids = await running(tmp_path)
        step.send_signal(signal.SIGTERM)
        assert step.wait(30) == 7
    assert not living(pids)


def test_a_host_that_cannot_be_reached_is_named_and_the_others_go_on(ssh: SshStandIn, tmp_path: Path) -> None:
    ssh.switch_off("n2")
    with start('echo done >"$NOTES/done"') as step:
        _, said = step.communicate(timeout=30)
    assert step.returncode == 255 and (tmp_path / "done").exists()
    assert said == "n2: ssh: connect to host n2 port 22: No route to host\n"


def test_a_command_that_is_not_there_is_told(ssh: SshStandIn) -> None:
    with subprocess.Popen(step_on(["n1"], ["/no/python"]), stderr=subprocess.PIPE, text=True) as step:
        _, said = step.communicate(timeout=30)
    assert step.returncode == 1 and "n1: " in said and "No such file or directory: '/no/python'" in said
