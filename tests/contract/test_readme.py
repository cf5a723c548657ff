"""What the README shows is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import settings_table
from tests.contract.count_tokens import table

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CI = (Path(__file__).parents[2] / ".ci" / "run").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def run_example(text: str, folder: Path) -> str:
    """What it prints."""
    script = folder / "example.py"
    script.write_text(text, encoding="utf-8")
    ended = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_python_example_runs_on_dragon(tmp_path: Path) -> None:
    state, ranks, summary = run_example(blocks("python")[0], tmp_path).splitlines()
    assert state.startswith("DONE ['HELLO 0 FROM ")
    assert ranks.count("\\n") == 4
    assert "'total_tasks': 5" in summary


def test_the_example_of_a_sweep_runs(tmp_path: Path) -> None:
    assert run_example(blocks("python")[1], tmp_path) == "[0.04, 0.01, 0.0] 0.0 tidy\n"


@pytest.mark.vllm
def test_the_inference_example_runs_on_vllm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rhapsody_mcp", "init", str(tmp_path), "--shipped-model"]
    subprocess.run(command, capture_output=True, check=True)
    answers = run_example(blocks("python")[2], tmp_path).splitlines()
    assert [set(json.loads(answer)) for answer in answers] == [{"f1", "f2", "f3", "f4", "label"}] * 2


def test_the_settings_for_clients_are_json_that_names_the_command() -> None:
    for settings in blocks("json"):
        (server,) = next(iter(json.loads(settings).values())).values()
        assert (Path(server["command"]).name, server["args"]) == ("rhapsody-mcp", ["stdio"])


@pytest.mark.vllm  # its tokenizer
def test_the_table_of_tools_says_what_is_so() -> None:
    assert table() in README, f"python -m tests.contract.count_tokens prints it:\n{table()}"


def test_the_table_of_settings_says_what_is_so() -> None:
    assert settings_table.table() in README, (
        f"python -m tests.contract.settings_table prints it:\n{settings_table.table()}"
    )


def test_ci_runs_what_the_readme_says() -> None:
    (torch,) = re.findall(r"pip install (--no-deps .*torch==\S+)", blocks("sh")[0])
    assert f"pip install --quiet {torch}\n" in CI
    (test,) = [block for block in blocks("sh") if "pytest" in block]
    install, command = (part.replace(".venv/bin/", "").strip() for part in test.split("&&"))
    assert install.replace("-e", "--quiet --editable") in CI
    assert command in CI
