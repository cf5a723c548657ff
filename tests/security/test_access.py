"""Who may call, and what."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.model.errors import InvalidSettings, UnknownName
from rhapsody_mcp.serving.http.tokens import TokenFile, TokenVerifier, read_plain_token, token_hash
from rhapsody_mcp.serving.paths import ServicePaths
from tests.agents import ERAS
from tests.security.guarded import OTHER_USER, Guarded, as_another_user, call_body, guarded, name_of
from tests.services import own_service

READING = {card.name for card in read_cards() if card.annotations.read_only}
ALL = {card.name for card in read_cards()}
_OUTSIDE = ("--host", "0.0.0.0", "--allowed-host", "127.0.0.1")
"""As other machines may connect, so that a token is demanded."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("guarded"), *_OUTSIDE) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        yield server


# --- tokens


def test_without_a_token_or_with_a_wrong_one_nobody_is_served(server: Guarded) -> None:
    for token in (None, "wrong", "rh_" + "x" * 43, ""):
        answer = server.post(call_body(), token)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


def test_a_token_is_served_until_it_is_revoked_without_a_restart(server: Guarded) -> None:
    token = server.tokens.create("short-lived")
    assert name_of(server.post(call_body(), token)) == ALL
    server.tokens.revoke("short-lived")
    assert server.post(call_body(), token).status_code == 401


def test_an_expired_token_is_refused(server: Guarded) -> None:
    yesterday = TokenFile(server.tokens.file, now=lambda: time.time() - 86_400)
    token = yesterday.create("expired", days=0.9)
    assert server.post(call_body(), token).status_code == 401
    assert "(expired)" in server.tokens.table()


def test_a_token_that_may_read_is_offered_what_reads(server: Guarded) -> None:
    token = server.tokens.create("reader", ["read"])
    assert name_of(server.post(call_body(), token)) == READING
    listed = server.post(call_body("tools/call", "list_sessions"), token)
    assert listed.json()["result"]["structuredContent"] == {"sessions": []}


def test_a_call_beyond_the_scope_is_refused_as_the_protocol_says(server: Guarded) -> None:
    token = server.tokens.create("reader-2", ["read"])
    answer = server.post(call_body("tools/call", "create_session"), token)
    assert answer.status_code == 403
    assert 'error="insufficient_scope", scope="run"' in answer.headers["WWW-Authenticate"]
    assert answer.json()["error"]["message"].startswith("create_session needs a token with the scope run")
    assert answer.json()["id"] == 1


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_a_client_of_either_era_reads_why_its_call_is_refused(era: Any, server: Guarded) -> None:
    headers = {"Authorization": f"Bearer {server.tokens.create(f'reader-{era}', ['read'])}"}
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(server.address, http_client=http), mode=era) as client,
    ):
        assert {tool.name for tool in (await client.list_tools()).tools} == READING
        assert "does not offer" in (client.instructions or "")
        with pytest.raises(MCPError, match="needs a token with the scope run"):
            await client.call_tool("create_session", {})


def test_a_body_that_hides_its_tool_finds_no_tool(server: Guarded) -> None:
    """The refusal looks at the body; what keeps a reader out is that the server behind it has no such tool."""
    token = server.tokens.create("reader-3", ["read"])
    body = '{"method":"tools/list","jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"list_tasks","name":"'
    body += 'create_session","arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}}'
    headers = {"Mcp-Method": "tools/call", "Mcp-Name": "create_session", "Authorization": f"Bearer {token}"}
    fixed = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    for version in ({"Mcp-Protocol-Version": "2026-07-28"}, {}):
        answer = httpx2.post(server.address, content=body, headers={**headers, **fixed, **version}, timeout=60)
        assert answer.status_code >= 400 and '"session-' not in answer.text
    listed = server.post(call_body("tools/call", "list_sessions"), token)
    assert listed.json()["result"]["structuredContent"] == {"sessions": []}


@pytest.mark.parametrize(
    ("headers", "status"), [({"Host": "evil.example"}, 421), ({"Origin": "http://evil.example"}, 403)]
)
def test_a_page_of_another_name_is_refused_even_with_a_token(
    headers: dict[str, str], status: int, server: Guarded
) -> None:
    token = server.tokens.create(f"page-{status}")
    assert server.post(call_body(), token, **headers).status_code == status


@pytest.mark.parametrize(("where", "here"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_beyond_this_machine_there_is_no_listener_without_a_token(where: str, here: str, tmp_path: Path) -> None:
    with guarded(tmp_path, "--host", where, "--allowed-host", "localhost") as server:
        assert httpx2.post(f"http://{here}:{server.port}/mcp", json=call_body(), timeout=60).status_code == 401
        assert server.tokens.read(), "one is made at the first start"


def test_a_server_whose_token_file_is_opened_to_others_or_damaged_takes_no_token(tmp_path: Path) -> None:
    with guarded(tmp_path, *_OUTSIDE) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        token = server.tokens.create("one")
        server.tokens.file.chmod(0o644)
        assert server.post(call_body(), token).status_code == 401
        server.tokens.file.chmod(0o600)
        assert server.post(call_body(), token).status_code == 200
        server.tokens.file.write_text("[{")
        assert server.post(call_body(), token).status_code == 401
        assert token not in server.end()


# --- the file of tokens


def test_no_token_is_in_the_file_and_nobody_else_reads_it(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "state" / "tokens.json")
    token = file.create("laptop", days=1)
    assert token not in file.file.read_text() and token_hash(token) in file.file.read_text()
    assert file.file.stat().st_mode & 0o777 == 0o600
    assert token not in file.table() and "laptop" in file.table()


def test_every_token_is_compared_whichever_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[str] = []
    file = TokenFile(tmp_path / "tokens.json")
    made = [file.create(f"t{number}") for number in range(5)]
    real = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr("hmac.compare_digest", counting)
    tokens = TokenVerifier(file, "a plain token of the user's")
    for token in (made[0], made[-1], "wrong"):
        compared.clear()
        found = tokens.find(token_hash(token))
        assert (found is None) == (token == "wrong")
        assert len(compared) == 6 and all(len(one) == 64 for one in compared)


def test_wrong_names_scopes_and_doubles_are_refused_in_words(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    file.create("laptop")
    with pytest.raises(InvalidSettings, match="there is a token 'laptop'"):
        file.create("laptop")
    with pytest.raises(InvalidSettings, match="is no name for a token"):
        file.create("../laptop")
    with pytest.raises(UnknownName, match=r"unknown scope 'reed' .did you mean 'read'"):
        file.create("other", ["reed"])
    with pytest.raises(UnknownName, match="unknown token 'lap'"):
        file.revoke("lap")


def test_a_first_token_is_made_where_none_is_valid_and_only_there(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    assert file.create_first()
    assert file.create_first() is None
    file.revoke("first")
    TokenFile(file.file, now=lambda: 0.0).create("first", days=1)
    assert file.create_first()
    assert [token.name for token in file.read()] == ["first", "first-2"]


def test_a_plain_token_of_the_users_is_compared_by_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("one-of-my-own-making\n")
    found = TokenVerifier(TokenFile(tmp_path / "none.json"), read_plain_token(file)).find(
        token_hash("one-of-my-own-making")
    )
    assert found is not None and found.name == "token-file" and "run" in found.scopes


# --- another user of this machine


def test_another_user_who_connects_to_a_local_port_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, urllib.request as u, urllib.error as e\n"
        "try: u.urlopen(u.Request(sys.argv[1], data=b'{}', headers={'Content-Type': 'application/json'}))\n"
        "except e.HTTPError as error: print(error.code)\n"
    )
    with guarded(tmp_path) as server:
        assert server.post(call_body()).status_code == 200
        assert as_another_user("/usr/bin/env", "python3", "-c", code, server.address).stdout.strip() == "401"
        server.end()
        (entry,) = server.audit(result="refused")
        assert entry["why"] == "HTTP status 401" and entry["caller"] == "127.0.0.1"


def test_another_user_cannot_connect_to_the_service(tmp_path: Path) -> None:
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1000))"
    with own_service() as service:
        assert service.run("service", "start").returncode == 0
        where = str(service.paths.socket)
        closed = as_another_user("/usr/bin/env", "python3", "-c", code, where)
        assert "PermissionError" in closed.stderr
        service.paths.socket_folder.chmod(0o755)
        service.paths.socket.chmod(0o666)
        opened = as_another_user("/usr/bin/env", "python3", "-c", code, where)
        service.paths.socket_folder.chmod(0o700)
        assert "is that of uid 0 alone" in opened.stdout + opened.stderr


def test_a_socket_that_another_user_has_made_in_our_place_is_not_spoken_to(tmp_path: Path) -> None:
    import os

    folder = Path("/tmp") / f"rhapsody-test-{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        places = ServicePaths(folder)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(places.socket))
            os.chown(places.socket, OTHER_USER, OTHER_USER)
            with pytest.raises(InvalidSettings, match=f"belongs to another user .uid {OTHER_USER}."):
                places.check()
    finally:
        places.socket.unlink()
        folder.rmdir()
