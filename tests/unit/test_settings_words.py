"""What a person is told of a settings file that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhapsody_mcp.model.errors import InvalidSettings
from rhapsody_mcp.settings import read_settings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "allowed_executables: /usr/bin/*",
            "allowed_executables: a list is needed, as in [/usr/bin/*], not '/usr/bin/*'",
        ),
        ("read_only: perhaps", "read_only: true or false is needed, not 'perhaps'"),
        ("max_sessions: many", "max_sessions: a whole number is needed, not 'many'"),
        ("wait_cap_s: long", "wait_cap_s: a number is needed, not 'long'"),
        (
            "read_only: true\nwait_cap_s: [",
            "is no valid YAML: line 2: while parsing a flow node, expected the node content",
        ),
        ("a: b: c", "is no valid YAML: line 1: mapping values are not allowed here."),
        ("toolsets: [task]", "unknown toolset 'task' (did you mean 'tasks'?)"),
    ],
)
def test_a_mistake_is_told_in_one_line_of_plain_words(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSettings) as caught:
        read_settings(file)
    said = str(caught.value)
    assert told in said and said.startswith(str(file)) and "\n" not in said


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"read_only: true # \xff")
    with pytest.raises(InvalidSettings, match="byte 19 of it is no UTF-8"):
        read_settings(file)
