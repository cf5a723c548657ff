"""What the doctor says of the ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rhapsody_mcp.cli import main
from rhapsody_mcp.doctor import Finding, examine, show
from rhapsody_mcp.ledger.ledger import Ledger
from rhapsody_mcp.ledger.records import PutSession
from rhapsody_mcp.ledger.store import LEDGER_FILE
from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.serving.paths import ServicePaths
from tests.ledgers import session

pytestmark = pytest.mark.anyio


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return ServicePaths().state


def told() -> Finding:
    return next(finding for finding in examine(inspect_machine()) if finding.what == "ledger")


async def test_the_doctor_says_where_the_ledger_is_what_is_in_it_and_who_holds_it(state: Path) -> None:
    assert told().verdict == "note" and f"none yet at {state / LEDGER_FILE}" in told().text
    ledger = Ledger(state)
    ledger.open()
    await ledger.commit(PutSession(session("a")), PutSession(session("b")))
    there = told()
    await ledger.commit(PutSession(session("c")))
    await ledger.close()
    assert there.verdict == "there" and "write-ahead log); open sessions: 2; held by process" in there.text
    assert "open sessions: 3; held by no process" in told().text


def test_the_doctor_looks_at_the_ledger_of_the_service_that_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    main(["doctor", "--folder", str(tmp_path / "x")])
    assert str(ServicePaths(tmp_path / "x").state / LEDGER_FILE) in capsys.readouterr().out
    there = next(one for one in examine(inspect_machine(), ServicePaths(tmp_path / "x")) if one.what == "ledger")
    assert str(ServicePaths(tmp_path / "x").state / LEDGER_FILE) in there.text


def test_the_doctor_says_what_is_wrong_with_a_damaged_ledger(state: Path) -> None:
    state.mkdir(parents=True)
    (state / LEDGER_FILE).write_bytes(b"something else" * 100)
    assert told().verdict == "note" and "not read: file is not a database" in told().text


def test_what_stands_in_brackets_is_shown() -> None:
    console = Console(record=True, width=200)
    show([Finding("vLLM", "missing", 'get it with: pip install "rhapsody-mcp[cpu]" in /tmp/[a]')], console)
    assert 'pip install "rhapsody-mcp[cpu]" in /tmp/[a]' in console.export_text()
