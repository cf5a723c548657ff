"""What `rhapsody-mcp clients` says to the person who runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.cli import main


def test_over_ssh_it_says_what_ssh_has_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "--ssh", "login.example"]) == 0
    assert "`ssh login.example` has to log in without asking for a password" in capsys.readouterr().out
    assert main(["clients"]) == 0
    assert "ssh" not in capsys.readouterr().out


def test_a_bundle_for_this_machine_says_how_to_write_one_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rhapsody.mcpb"
    assert main(["clients", "--bundle", str(file)]) == 0
    assert "--ssh HOST" in capsys.readouterr().out
    assert main(["clients", "--bundle", str(file), "--ssh", "login.example"]) == 0
    assert "--ssh" not in (said := capsys.readouterr().out) and "`ssh login.example`" in said
