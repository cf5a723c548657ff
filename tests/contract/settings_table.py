"""Prints the README's table of settings: python -m tests.contract.settings_table"""

from __future__ import annotations

import sys

import yaml
from pydantic.fields import FieldInfo

from rhapsody_mcp.settings import Settings

__all__ = ["table"]


def table() -> str:
    """In Markdown, a line a key."""
    rows = [f"| `{key}` | {_default(field)} | {_meaning(field)} |" for key, field in Settings.model_fields.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _default(field: FieldInfo) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(default, default_flow_style=True, width=10_000).splitlines()[0]
    return f"`{text}`"


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
