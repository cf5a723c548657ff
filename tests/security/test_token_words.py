"""What is told of tokens, to whom they are refused and to whom looks after them."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rhapsody_mcp.cli import main
from rhapsody_mcp.serving.paths import ServicePaths
from tests.security.guarded import Guarded, call_body, guarded


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("guarded"), "--host", "0.0.0.0", "--allowed-host", "127.0.0.1") as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        yield server


def test_a_token_that_is_not_taken_is_refused_with_one_text_whatever_it_was(server: Guarded) -> None:
    revoked = server.tokens.create("revoked")
    server.tokens.revoke("revoked")
    for token in (revoked, "rh_" + "x" * 43):
        answer = server.post(call_body(), token)
        words = "the token is not known here, was revoked or has expired; make one with: rhapsody-mcp token create NAME"
        assert answer.status_code == 401
        assert f'error="invalid_token", error_description="{words}"' in answer.headers["WWW-Authenticate"]
        assert answer.json()["error"]["message"] == words and answer.json()["jsonrpc"] == "2.0"


def test_who_sends_no_token_is_told_that_one_is_needed(server: Guarded) -> None:
    answer = server.post(call_body())
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="rhapsody-mcp"')
    assert "a bearer token is needed" in answer.json()["error"]["message"]


def test_a_token_without_an_end_is_listed_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "create", "laptop", "--folder", str(tmp_path)]) == 0
    assert main(["token", "list", "--folder", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "no end" in listed and "revoked" not in listed


def test_what_is_made_for_tokens_is_open_to_us_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert main(["token", "create", "laptop", "--folder", str(folder)]) == 0
    tokens = ServicePaths(folder).tokens
    for made, mode in ((tmp_path / "new", 0o700), (folder, 0o700), (tokens.parent, 0o700), (tokens, 0o600)):
        assert stat.S_IMODE(made.stat().st_mode) == mode
    assert stat.S_IMODE(tokens.with_suffix(".lock").stat().st_mode) == 0o600


def test_tokens_that_are_made_and_revoked_are_in_the_audit_log(tmp_path: Path) -> None:
    for action in ("create", "revoke"):
        assert main(["token", action, "laptop", "--folder", str(tmp_path)]) == 0
    lines = ServicePaths(tmp_path).audit.read_text().splitlines()
    assert [(entry["method"], entry["token"]) for entry in map(json.loads, lines)] == [
        ("token create", "laptop"),
        ("token revoke", "laptop"),
    ]


def test_the_first_token_of_a_server_is_in_the_audit_log(tmp_path: Path) -> None:
    with guarded(tmp_path, "--host", "0.0.0.0", "--allowed-host", "127.0.0.1") as server:
        server.end()
        assert [entry["token"] for entry in server.audit(method="token create")] == ["first"]
