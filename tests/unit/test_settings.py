"""Reading the settings file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.settings import Settings, read_settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_a_file_sets_what_it_names_and_leaves_the_rest(file: Path) -> None:
    file.write_text("wait_cap_s: 10\nendpoint_url: http://127.0.0.1:8000/v1\n")
    assert read_settings(file) == Settings(wait_cap_s=10, endpoint_url="http://127.0.0.1:8000/v1")


def test_the_users_own_file_need_not_be_there_and_is_read_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rhapsody_mcp.settings.settings_file", lambda: tmp_path / "own.yaml")
    assert read_settings() == Settings()
    (tmp_path / "own.yaml").write_text("")
    assert read_settings() == Settings()
    (tmp_path / "own.yaml").write_text("default_model: /models/qwen")
    assert read_settings().default_model == "/models/qwen"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("wait_cap: 5", r"unknown key 'wait_cap' \(did you mean 'wait_cap_s'\?\). Valid: wait_default_s, wait_cap_s"),
        ("wait_cap_s: -1", "wait_cap_s: Input should be greater than 0, not -1"),
        ("wait_cap_s: [", "is no valid YAML"),
        ("- 1", "holds no keys"),
    ],
)
def test_a_mistake_is_named_with_the_file_and_what_is_valid(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=told) as caught:
        read_settings(file)
    assert str(file) in str(caught.value)


def test_a_file_that_was_named_must_be_there(file: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read: No such file"):
        read_settings(file)
