"""Which language models are on this machine, by a look at folders, and what is to be known of the shipped one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rhapsody_mcp.shipped_model import MODEL_NAME

__all__ = ["SHIPPED_NOTE", "hub_cache", "look_for_models", "models_text", "shipped_text"]

_WRITES = "writes one kind of labelled JSON sample whatever it is asked"
_MOST_SHOWN = 5
_OTHERS = "create_session with model (a folder or a hub name) or endpoint_url"
SHIPPED_NOTE = f"{MODEL_NAME}, shipped for trials, {_WRITES}; another: create_session with model or endpoint_url"


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Hugging Face keeps what it downloaded."""
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(cache))


def look_for_models() -> list[str]:
    """The hub names of the models that lie there whole enough to have a configuration."""
    found = hub_cache().glob("models--*/snapshots/*/config.json")
    return sorted({path.parts[-4].removeprefix("models--").replace("--", "/") for path in found})


def models_text() -> str:
    """As in `Models on this machine: a/b, c/d, and 2 more.`"""
    there = look_for_models()
    if not there:
        return f"No other model is in {hub_cache()}."
    more = f", and {len(there) - _MOST_SHOWN} more" if len(there) > _MOST_SHOWN else ""
    return f"Models on this machine: {', '.join(there[:_MOST_SHOWN])}{more}."


def shipped_text() -> str:
    """What an agent must know before it gives the shipped model a prompt."""
    return f"the shipped model {MODEL_NAME}, for trials: it {_WRITES}. {models_text()} For another: {_OTHERS}."
