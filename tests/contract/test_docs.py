"""What docs/ show is run, and what they name is there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.cli import command_parser
from rhapsody_mcp.model.values import INLINE_BYTES
from rhapsody_mcp.schedulers.options import AllocationProfile
from rhapsody_mcp.settings import Settings, read_settings
from tests.contract import settings_table
from tests.contract.documents import DOCUMENTS, ROOT, blocks, run_example
from tests.contract.test_imports import KNOWS

PACKAGE = ROOT / "rhapsody_mcp"
ARCHITECTURE = DOCUMENTS["docs/architecture.md"]
PYTHON = blocks("python", "docs/python.md")
EXECUTOR = blocks("python", "docs/executor.md")
every_document = pytest.mark.parametrize("document", DOCUMENTS)


def section(title: str) -> str:
    """What stands below a heading of docs/architecture.md."""
    return ARCHITECTURE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def where(name: str) -> Path | None:
    """The file or folder that a text names, in the repository or in the package."""
    return next((place / name for place in (PACKAGE, ROOT) if (place / name).exists()), None)


# --- what is run


def test_the_python_example_runs_on_dragon(tmp_path: Path) -> None:
    state, ranks, summary = run_example(PYTHON[0], tmp_path).splitlines()
    assert state.startswith("DONE ['HELLO 0 FROM ")
    assert ranks.count("\\n") == 4
    assert "'total_tasks': 5" in summary


def test_the_example_of_needs_runs(tmp_path: Path) -> None:
    assert run_example(PYTHON[1], tmp_path) == "('1', 1) True\n2.0 3.0 4.0 True\n"


def test_the_example_of_output_and_progress_runs(tmp_path: Path) -> None:
    *printed, function, program = run_example(PYTHON[2], tmp_path).splitlines()
    assert printed and printed == [f"epoch {epoch}" for epoch in range(1, len(printed) + 1)]
    assert function == "CANCELED True True"
    assert program == "half {'energy': -3.5}"


def test_the_example_of_watching_runs(tmp_path: Path) -> None:
    shown = "<Session seeds (closed): 9 DONE, 1 FAILED>\nseeds.html seeds.svg seeds.json\n"
    assert run_example(PYTHON[3], tmp_path) == shown
    assert "nothing grows from 7" in (tmp_path / "seeds.html").read_text(encoding="utf-8")


def test_the_example_of_files_runs(tmp_path: Path) -> None:
    assert run_example(PYTHON[4], tmp_path) == "{'loss': 0.5} ['out', 'result.json']\n1.0 42\n"


def test_the_example_of_order_conditions_and_retries_runs(tmp_path: Path) -> None:
    first, why, again = run_example(PYTHON[5], tmp_path).splitlines()
    assert first == "FAILED [1, None] 1 tidy skipped"
    assert why.startswith("FileNotFoundError(2, ")
    assert again == "DONE [1, 2] 3 all 3"


def test_the_examples_of_executors_run(tmp_path: Path) -> None:
    own, of_session = (run_example(example, tmp_path) for example in EXECUTOR)
    assert own == "[0, 1, 4, 9, 16] 333283335000\n[0, 10, 20]\n1024\ncrashed 1\ncalls.html\n"
    assert of_session == "[0, 2, 4, 6]\n9900\n"


def test_the_example_of_asyncflow_runs(tmp_path: Path) -> None:
    (example,) = blocks("python", "docs/asyncflow.md")
    results, session, files = run_example(example, tmp_path).splitlines()
    assert results == r"['kept 0.03\n', 'kept 0.05\n']"
    assert session == "<Session campaign (closed): 16 DONE>"
    assert files == "campaign.html campaign.json"
    assert "simulate.0" in (tmp_path / "campaign.html").read_text(encoding="utf-8")


@pytest.mark.ci
@pytest.mark.vllm
def test_the_inference_example_runs_on_vllm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rhapsody_mcp", "init", str(tmp_path), "--shipped-model"]
    subprocess.run(command, capture_output=True, check=True)
    answers = run_example(PYTHON[6], tmp_path).splitlines()
    assert [set(json.loads(answer)) for answer in answers] == [{"f1", "f2", "f3", "f4", "label"}] * 2


def test_every_python_example_is_among_those_that_run() -> None:
    documents = [name for name in DOCUMENTS if blocks("python", name)]
    assert documents == ["README.md", "docs/asyncflow.md", "docs/executor.md", "docs/python.md"]
    assert (len(PYTHON), len(EXECUTOR)) == (7, 2)


# --- what is read


def test_the_settings_for_clients_are_json_that_names_the_command() -> None:
    for settings in blocks("json", "docs/clients.md"):
        (server,) = next(iter(json.loads(settings).values())).values()
        assert (Path(server["command"]).name, server["args"]) == ("rhapsody-mcp", ["stdio"])


def test_the_table_of_settings_says_what_is_so() -> None:
    assert settings_table.table() in DOCUMENTS["docs/settings.md"], (
        f"python -m tests.contract.settings_table prints it:\n{settings_table.table()}"
    )


def test_the_example_of_settings_is_valid() -> None:
    (example,) = blocks("yaml", "docs/settings.md")
    assert Settings(**yaml.safe_load(example)).default_num_workers == 8
    (example,) = blocks("yaml", "docs/allocations.md")
    assert set(Settings(**yaml.safe_load(example)).allocation_profiles) == {"debug", "gpu"}
    profiles = read_settings(ROOT / "docs/profiles.yaml").allocation_profiles
    assert all(profile.account for profile in profiles.values())


def test_every_option_of_a_profile_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", DOCUMENTS["docs/allocations.md"]))
    assert not set(AllocationProfile.__struct_fields__) - explained


def command_lines(document: str) -> Iterator[list[str]]:
    """The words of each command in the blocks of shell, and of those of this package in the text, tables aside."""
    for block in blocks("sh", document):
        for line in block.splitlines():
            for command in re.split(r"&&|&$", line.partition(" # ")[0]):
                if words := shlex.split(command):
                    yield words
    prose = re.sub(r"^\|.*$", "", DOCUMENTS[document], flags=re.M)
    yield from map(shlex.split, re.findall(r"`(rhapsody-mcp [^`…]+)`", prose))


@every_document
def test_the_command_line_knows_every_command(document: str) -> None:
    for words in command_lines(document):
        if Path(words[0]).name == "rhapsody-mcp":
            command_parser().parse_args(words[1:])


@every_document
def test_every_module_that_is_run_is_there(document: str) -> None:
    text = DOCUMENTS[document].replace("python -m venv", "")
    ours = {name for name in re.findall(r"python3? (?:-P )?-m ([\w.]+)", text) if name.split(".")[0] != "venv"}
    assert not [name for name in ours if importlib.util.find_spec(name) is None]


def test_the_numbers_of_the_settings_are_so() -> None:
    settings = Settings()
    assert settings.engine_idle_s is not None
    bounds = (
        f"{settings.request_bytes // 1024**2} MiB each, {settings.http_requests_per_s:g} a second and "
        f"{settings.http_connections // 2} at a time for one client, {settings.http_connections} connections, "
        f"{settings.http_slow_s:g} s for the head and {settings.http_slow_s:g} s for the body"
    )
    assert bounds in one_line("docs/http.md")
    operation = one_line("docs/operation.md")
    assert f"after {settings.service_idle_s / 60:g} minutes without a client" in operation
    assert f"nothing to do for {settings.engine_idle_s / 60:g} minutes" in operation
    assert f"nobody has used for {settings.keep_sessions_days:g} days" in operation
    assert f"Up to {INLINE_BYTES // 1024} KB" in ARCHITECTURE


def one_line(document: str) -> str:
    return " ".join(DOCUMENTS[document].split())


# --- what is named


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_link_leads_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@every_document
def test_every_path_and_function_is_there(document: str) -> None:
    named = re.findall(r"`([\w./-]+/[\w.-]*|[\w-]+\.(?:py|md))(?:: (\w+))?`", DOCUMENTS[document])
    own = [(path, function) for path, function in named if path.endswith((".py", ".md", "/")) and path[0] != "/"]
    for path, function in own:
        file = where(path)
        assert file is not None, path
        if function:
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            assert function in {node.name for node in nodes if isinstance(node, functions)}, f"{path}: {function}"


@pytest.mark.parametrize("document", ["docs/clients.md", "docs/http.md", "docs/operation.md"])
def test_every_setting_tool_and_argument_is_there(document: str) -> None:
    schemas = [
        json.loads(file.read_text(encoding="utf-8")) for file in (ROOT / "tests/contract/snapshots").glob("*.json")
    ]
    arguments = {name for schema in schemas for name in schema["inputSchema"]["properties"]}
    known = {*Settings.model_fields, *(card.name for card in read_cards()), *arguments}
    prose = re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.M | re.S)
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", prose)) - {"elicitation_handler"}
    assert not named - known


def test_every_folder_is_listed_once_and_below_what_it_imports() -> None:
    listed = re.findall(r"^\| `(\w+(?:/\w+)*)/` \|", section("Folders"), re.M)
    folders = {str(file.parent.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")} - {"."}
    assert sorted(listed) == sorted(folders)
    tops = [folder for folder in listed if "/" not in folder]
    for place, folder in enumerate(tops):
        assert not KNOWS.get(folder, set()) & set(tops[place:]), folder


def test_every_module_beside_the_folders_is_named() -> None:
    modules = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not [name for name in modules if f"`{name}`" not in section("Folders")]


def test_every_program_of_an_engine_is_among_the_processes() -> None:
    programs = {file for file in (PACKAGE / "engine").glob("*.py") if _has_main(file)}
    programs |= {file for file in PACKAGE.rglob("*.py") if _is_run(file)}
    paths = {str(file.relative_to(PACKAGE)) for file in programs} - {"__main__.py", "shipped_model/train.py"}
    shown = section("Processes")
    assert not [path for path in paths if not path.startswith("bench/") and f"`{path}`" not in shown]


def _has_main(file: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in _statements(file))


def _is_run(file: Path) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in _statements(file))


def _statements(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body
