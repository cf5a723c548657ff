"""Prints the table of docs/settings.md: python -m tests.contract.settings_table"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys

import yaml
from pydantic.fields import FieldInfo

from rhapsody_mcp.settings import Settings

__all__ = ["table"]


def table() -> str:
    """In Markdown, a line a key."""
    meanings = _meanings()
    rows = [f"| `{key}` | {_default(field)} | {meanings[key]} |" for key, field in Settings.model_fields.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _default(field: FieldInfo) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(default, default_flow_style=True, width=10_000).splitlines()[0]
    return f"`{text}`"


def _meanings() -> dict[str, str]:
    """What stands below each key."""
    (definition,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), field.target.id
            meanings[field.target.id] = " ".join(str(below.value.value).split())
    return meanings


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
