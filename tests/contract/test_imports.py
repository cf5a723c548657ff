"""How the package is laid out: what a folder may import of the others, and how large files and folders are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rhapsody_mcp"
KNOWS: dict[str, set[str]] = {
    "model": set(),
    "schedulers": {"model"},
    "engine": {"model", "schedulers", "task"},
    "ledger": {"model", "engine"},
    "backends": {"model", "engine", "schedulers", "shipped_model"},
    "runtime": {"model", "engine", "schedulers", "ledger", "backends", "machine", "settings"},
    "dashboard": {"model", "runtime"},
    "api": {"model", "backends", "runtime", "dashboard"},
    "integrations": {"model", "runtime", "api"},
    "toolsets": {"model", "schedulers", "backends", "runtime", "dashboard", "machine", "settings", "cards"},
    "protocol": {"model", "ledger", "runtime", "dashboard", "settings", "cards", "toolsets"},
    "demo": {"model", "runtime", "api", "backends", "settings", "server", "serving", "shipped_model"},
    "bench": {"model", "engine", "ledger", "backends", "runtime", "api", "settings", "server", "serving", "toolsets"},
    "serving": {"model", "ledger", "runtime", "dashboard", "settings", "cards", "toolsets", "protocol", "server"},
}
ALONE = {"dragon": {"engine", "bench/bare_dragon.py"}, "vllm": {"engine"}}
"""Packages of others, and where alone they are imported."""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "rhapsody_mcp":
            yield from (f"rhapsody_mcp.{alias.name}" for alias in node.names if (PACKAGE / alias.name).is_dir())
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_package_imports_what_is_above_it() -> None:
    above = {
        (str(file.relative_to(PACKAGE)), name)
        for package, known in KNOWS.items()
        for file in (PACKAGE / package).rglob("*.py")
        for name in imports(file)
        if name.startswith("rhapsody_mcp.") and name.split(".")[1] not in known | {package}
    }
    assert not above


def test_dragon_and_vllm_are_imported_only_where_they_may_be() -> None:
    elsewhere = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        for name in imports(file)
        if (own := ALONE.get(name.split(".")[0]))
        and own.isdisjoint({file.relative_to(PACKAGE).parts[0], str(file.relative_to(PACKAGE))})
    }
    assert not elsewhere


def modules() -> dict[str, Path]:
    files = (file for file in PACKAGE.rglob("*.py") if "vllm_site" not in file.parts)
    return {
        ".".join(("rhapsody_mcp", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in files
    }


def imported_modules(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Also those that are imported for type annotations alone, and inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: {*imported_modules(file, known)} - {name} for name, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' imports '.join(error.args[1])}") from None


ENTRY_POINTS = {"keeper", "host", "worker", "rank", "supervisor", "fork_server", "vllm_launcher"}
"""The programs in engine/."""


def test_files_and_folders_are_small_enough_to_be_read() -> None:
    long = {str(file): count for file in PACKAGE.rglob("*.py") if (count := len(file.read_text().splitlines())) > 450}
    assert not long
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    full = {
        str(folder): len(names)
        for folder in folders
        if len(names := {file.stem for file in folder.glob("*.py")} - {"__init__"} - ENTRY_POINTS) > 14
    }
    assert not full
