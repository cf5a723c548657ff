"""Finds the language models on this machine, and describes the shipped model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rhapsody_mcp.shipped_model import MODEL_NAME

__all__ = ["SHIPPED_NOTE", "downloaded_models", "hub_cache", "models_text", "shipped_text"]

_ANSWERS = "writes one kind of labelled JSON sample whatever it is asked"
_MAX_SHOWN = 5
_OTHERS = "create_session with model (a folder or a hub name) or endpoint_url"
SHIPPED_NOTE = f"{MODEL_NAME}, shipped for trials, {_ANSWERS}; another: create_session with model or endpoint_url"


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of the models that Hugging Face has downloaded."""
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(cache))


def downloaded_models() -> list[str]:
    """The hub names of the downloaded models that have a configuration file."""
    configurations = hub_cache().glob("models--*/snapshots/*/config.json")
    return sorted({path.parts[-4].removeprefix("models--").replace("--", "/") for path in configurations})


def models_text() -> str:
    """A sentence such as `Models on this machine: a/b, c/d, and 2 more.`"""
    names = downloaded_models()
    if not names:
        return f"No other model is in {hub_cache()}."
    more = f", and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"Models on this machine: {', '.join(names[:_MAX_SHOWN])}{more}."


def shipped_text() -> str:
    """What an agent must know before it gives the shipped model a prompt."""
    return f"the shipped model {MODEL_NAME}, for trials: it {_ANSWERS}. {models_text()} For another: {_OTHERS}."
