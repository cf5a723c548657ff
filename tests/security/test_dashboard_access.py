"""Who may look at the page's data over HTTP, and who may cancel on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.security.guarded import Guarded, call_body, guarded

SLEEPER = {"name": "long", "executable": "/bin/sleep", "arguments": ["600"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("guarded"), "--host", "0.0.0.0", "--allowed-host", "127.0.0.1") as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        token = server.tokens.create("maker")
        for tool, arguments in (
            ("create_session", {"backends": ["local"]}),
            ("submit_tasks", {"session": "session-1", "tasks": [SLEEPER]}),
        ):
            assert not server.post(call_body("tools/call", tool, **arguments), token).json()["result"].get("isError")
        while ask(server, "tasks?session=session-1", token).json()["tasks"][0]["state"] == "QUEUED":
            time.sleep(0.05)  # that it runs is no event here
        yield server


def ask(server: Guarded, what: str, token: str | None, method: str = "GET", **headers: str) -> httpx2.Response:
    address = server.address.removesuffix("/mcp") + f"/dashboard/{what}"
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.request(method, address, headers={**sent, **headers}, timeout=30)


ASKED = ["sessions", "tasks?session=session-1", "events?session=session-1", "report?session=session-1"]


@pytest.mark.parametrize("what", ASKED)
def test_without_a_token_nobody_is_told_anything(server: Guarded, what: str) -> None:
    for token in (None, "wrong"):
        answer = ask(server, what, token)
        assert answer.status_code == 401 and b"session-1" not in answer.content


def test_the_page_itself_holds_no_data_and_needs_no_token(server: Guarded) -> None:
    page = ask(server, "", None)
    assert page.status_code == 200 and b"session-1" not in page.content
    assert page.headers["X-Content-Type-Options"] == "nosniff" and page.headers["Cache-Control"] == "no-store"


def test_who_may_read_sees_and_does_not_cancel(server: Guarded) -> None:
    reader = server.tokens.create("reader", scopes=["read"])
    assert ask(server, "sessions", reader).json()["sessions"][0]["session"] == "session-1"
    refused = ask(server, "cancel?session=session-1", reader, "POST")
    assert refused.status_code == 403 and "the scope run" in refused.json()["error"]
    assert ask(server, "tasks?session=session-1", reader).json()["tasks"][0]["state"] == "RUNNING"


def test_a_get_cancels_nothing_and_an_unknown_question_is_refused(server: Guarded) -> None:
    token = server.tokens.create("runner")
    for what in ("cancel?session=session-1", "weather", "task?session=session-1&uid=x"):
        assert ask(server, what, token).status_code in (400, 404, 405)
    assert ask(server, "sessions", token, "DELETE").status_code == 405
    assert ask(server, "tasks?session=session-1", token).json()["tasks"][0]["state"] == "RUNNING"


@pytest.mark.parametrize("headers", [{"Host": "attacker.example"}, {"Origin": "http://attacker.example"}])
def test_a_page_of_another_host_is_refused(server: Guarded, headers: dict[str, Any]) -> None:
    token = server.tokens.create(f"other-{next(iter(headers))}")
    for what in ("sessions", "", "report?session=session-1"):
        assert ask(server, what, token, **headers).status_code in (403, 421)
    assert ask(server, "cancel?session=session-1", token, "POST", **headers).status_code in (403, 421)


def test_a_cancel_is_written_into_the_audit_log(tmp_path_factory: pytest.TempPathFactory) -> None:
    with guarded(tmp_path_factory.mktemp("audited"), "--host", "0.0.0.0", "--allowed-host", "127.0.0.1") as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        token = server.tokens.create("jane")
        server.post(call_body("tools/call", "create_session", backends=["local"]), token)
        server.post(call_body("tools/call", "submit_tasks", session="session-1", tasks=[SLEEPER]), token)
        assert ask(server, "cancel?session=session-1", token, "POST").json() == {"canceled": 1}
        assert ask(server, "tasks?session=session-1", token).json()["tasks"][0]["state"] == "CANCELED"
        server.end()
        (entry,) = server.audit(method="dashboard cancel")
        assert entry["caller"] == "token jane" and entry["canceled"] == 1 and entry["tasks"] == ["task.000001"]
