"""What the README shows is run, and the README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rhapsody_mcp.model.install_commands import vllm_install_command
from tests.contract.count_tokens import table
from tests.contract.documents import DOCUMENTS, ROOT, blocks, run_example

README = DOCUMENTS["README.md"]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README) <= 7000


def test_the_python_example_runs_on_dragon(tmp_path: Path) -> None:
    (example,) = blocks("python", "README.md")
    assert run_example(example, tmp_path) == "14\n"


@pytest.mark.vllm  # its tokenizer
def test_the_table_of_tools_says_what_is_so() -> None:
    assert table() in README, f"python -m tests.contract.count_tokens prints it:\n{table()}"


def test_ci_runs_what_the_readme_says() -> None:
    (test,) = [block for block in blocks("sh", "README.md") if "pytest" in block]
    install, command = (part.replace(".venv/bin/", "").strip() for part in test.split("&&"))
    assert install.replace("-e", "--quiet --editable") in CI
    assert command in CI
    (torch,) = re.findall(r"pip install (--no-deps .*torch==\S+)", blocks("sh", "README.md")[0])
    assert f"pip install --quiet {torch}\n" in CI
    assert f"pip install {torch} && " in vllm_install_command(gpu=False)


def test_it_links_to_every_document() -> None:
    assert not [path for path in DOCUMENTS if path != "README.md" and f"({path})" not in README]


def test_it_counts_the_faults_of_the_table() -> None:
    table = DOCUMENTS["docs/faults.md"].partition("| --- |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert f"{len(rows)} faults" in README
