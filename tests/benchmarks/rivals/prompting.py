"""What the contestants that answer prompts have in common: the model, its settings, and the prompts."""

from __future__ import annotations

import os

from rhapsody_mcp.engine import vllm_launcher
from rhapsody_mcp.shipped_model import MODEL_DIR

__all__ = ["MODEL", "TOKENS", "prompt", "settle"]

MODEL = str(MODEL_DIR)
TOKENS = 32


def prompt(number: int) -> str:
    return f"Write a labelled sample, number {number}."


def settle() -> None:
    """As for this package's servers: variables, and libraries that do not load beside this torch look absent."""
    os.environ |= {"VLLM_PLUGINS": "none", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    vllm_launcher._hide([name for name in vllm_launcher._MEDIA_LIBRARIES if not vllm_launcher._can_import(name)])
