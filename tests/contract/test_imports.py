"""Imports point one way: what a package may know of the others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rhapsody_mcp"
KNOWS: dict[str, set[str]] = {
    "model": set(),
    "engine": {"model"},
    "ledger": {"model", "engine"},
    "backends": {"model", "engine", "shipped_model"},
    "runtime": {"model", "engine", "ledger", "backends", "machine", "settings"},
    "api": {"model", "runtime"},
    "toolsets": {"model", "backends", "runtime", "machine", "settings", "cards"},
    "protocol": {"model", "ledger", "runtime", "settings", "cards", "toolsets"},
    "demo": {"model", "runtime", "api", "backends", "settings", "server", "serving", "shipped_model"},
    "bench": {"model", "engine", "ledger", "backends", "runtime", "api", "settings", "server", "serving", "toolsets"},
    "serving": {"model", "ledger", "runtime", "settings", "cards", "protocol", "server"},
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
