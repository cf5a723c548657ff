"""What the contestants that answer prompts have in common: the model, its settings, and the prompts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from rhapsody_mcp.engine import vllm_launcher

__all__ = ["MODEL", "TOKENS", "prompt", "settle"]

_PACKAGE = find_spec("rhapsody_mcp")
assert _PACKAGE is not None and _PACKAGE.origin is not None
MODEL = str(Path(_PACKAGE.origin).parent / "shipped_model" / "weights")
TOKENS = 32


def prompt(number: int) -> str:
    return f"Write a labelled sample, number {number}."


def settle() -> None:
    """As for this package's servers: variables, and libraries that do not load beside this torch look absent."""
    os.environ |= {"VLLM_PLUGINS": "none", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    vllm_launcher._hide([name for name in vllm_launcher._MEDIA if not vllm_launcher._loads(name)])
