"""What the README shows is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from rhapsody_mcp.text import read_cards

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CI = (Path(__file__).parents[2] / ".ci" / "run").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_example_runs_on_dragon(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(blocks("python")[0], encoding="utf-8")
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    state, ranks, summary = ended.stdout.splitlines()
    assert state.startswith("DONE ['HELLO 0 FROM ")
    assert ranks.count("\\n") == 4
    assert "'total_tasks': 5" in summary


def test_the_other_python_example_is_valid() -> None:
    (_, inference) = blocks("python")
    compile(inference, "README.md", "exec")


def test_the_settings_for_clients_are_json_that_names_the_command() -> None:
    for settings in blocks("json"):
        (server,) = next(iter(json.loads(settings).values())).values()
        assert (Path(server["command"]).name, server["args"]) == ("rhapsody-mcp", ["stdio"])


def test_every_tool_is_named_and_no_other() -> None:
    listed = README.partition("Ten tools: ")[2].partition("What an agent reads")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {card.name for card in read_cards()}


def test_ci_runs_what_the_readme_says() -> None:
    (test,) = [block for block in blocks("sh") if "pytest" in block]
    install, command = (part.replace(".venv/bin/", "").strip() for part in test.split("&&"))
    assert install.replace("-e", "--quiet --editable") in CI
    assert command in CI
