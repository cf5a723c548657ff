"""The commands by which a person makes, lists and revokes tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rhapsody_mcp.cli import main
from rhapsody_mcp.serving.http.tokens import TokenFile, token_hash
from rhapsody_mcp.serving.paths import ServicePaths


def test_a_token_is_printed_once_listed_without_itself_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--folder", str(tmp_path)]
    assert main(["token", "create", "laptop", "--scopes", "read", "--days", "30", *where]) == 0
    made = capsys.readouterr()
    token = made.out.strip()
    assert re.fullmatch(r"rh_[\w-]{43}", token) and "shown only now" in made.err and token not in made.err
    (kept,) = TokenFile(ServicePaths(tmp_path).tokens).read()
    assert (kept.name, kept.scopes, kept.hash) == ("laptop", ("read",), token_hash(token))
    assert kept.expires is not None and 29.9 < (kept.expires - kept.created) / 86_400 < 30.1
    assert main(["token", "list", *where]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^laptop +read +\d{4}-", listed, re.M) and token not in listed
    assert main(["token", "revoke", "laptop", *where]) == 0
    assert main(["token", "list", *where]) == 0
    assert "There is no token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "a b"], "is no name for a token"),
        (["create", "x", "--scopes", "write"], "unknown scope 'write'"),
        (["revoke", "nobody"], "unknown token 'nobody'"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", *words, "--folder", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("days", ["0", "-1", "nan", "soon"])
def test_a_time_that_is_none_is_refused(days: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["token", "create", "x", "--days", days, "--folder", str(tmp_path)])
