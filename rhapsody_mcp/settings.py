"""Reads the settings file: YAML in, frozen settings out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rhapsody_mcp.model.errors import InvalidSettings, nearest

__all__ = ["Settings", "read_settings", "settings_file"]


class Settings(BaseModel):
    """What the person who runs the server decides. Every key has a default that works."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    wait_default_s: Annotated[float, Field(gt=0)] = 25.0
    """How long wait_tasks waits when it is not told, in seconds."""
    wait_cap_s: Annotated[float, Field(gt=0)] = 55.0
    """The longest that one wait_tasks waits; many clients give up on a call after 60 s."""
    result_bytes: Annotated[int, Field(ge=256, le=10_000)] = 8192
    """How much of a result one get_result returns, in bytes."""
    notice_interval_s: Annotated[float, Field(ge=0)] = 1.0
    """A subscriber hears of each resource's changes at once, and then at most once in this time, in seconds."""
    default_model: str = "shipped"
    """The model of the vllm backend where create_session names none: a path, a hub name, or "shipped"."""
    default_num_workers: Annotated[int, Field(ge=1)] | None = None
    """Worker processes of a session where create_session names no number; null for one a core."""
    endpoint_url: str | None = None
    """An OpenAI-compatible server that sessions use for prompts when they ask for the endpoint backend."""
    endpoint_model: str | None = None
    """A model that it serves; null for its first."""
    endpoint_api_key: str | None = None
    """Sent to `endpoint_url` and to no other address."""
    budget_tasks: Annotated[int, Field(ge=0)] | None = 10_000
    """How many tasks a session takes before submit_tasks asks the person; null for any number."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The same for the sum of max_tokens over its prompts; one that does not say it counts as none."""
    read_only: bool = False
    """Offer only the tools that change nothing."""
    toolsets: tuple[str, ...] | None = None
    """Offer only the tools of these folders of tools/, as in [sessions, tasks]; null for all."""
    http_token_file: Path | None = None
    """Holds the bearer token that HTTP clients must send. Without it a token is asked for only where other machines
    can connect, and it is in a file of the user's state folder."""
    http_allowed_hosts: tuple[str, ...] = ()
    """More names by which HTTP clients may call this host, such as that of a proxy."""


def settings_file() -> Path:
    """Where the settings are read from when no other file is named; it need not exist."""
    return platformdirs.user_config_path("rhapsody-mcp") / "settings.yaml"


def read_settings(file: Path | None = None) -> Settings:
    """The settings in `file`, which must exist, or in the user's own file, which need not.

    Raises InvalidSettings, which names the file, the key and what is valid.
    """
    if file is None and not settings_file().is_file():
        return Settings()
    path = file or settings_file()
    try:
        return Settings(**_mapping(path))
    except ValidationError as error:
        raise InvalidSettings(f"{path}: {'; '.join(_explained(error))}.") from error


def _mapping(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"the settings file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InvalidSettings(f"{path} is no valid YAML: {error}") from error
    if not isinstance(read, dict | None) or not all(isinstance(key, str) for key in read or ()):
        raise InvalidSettings(f"{path} holds no keys with values, as in 'wait_cap_s: 55'.")
    return read or {}


def _explained(error: ValidationError) -> list[str]:
    known = list(Settings.model_fields)
    return [
        f"unknown key {key!r}{nearest(key, known)}. Valid: {', '.join(known)}"
        if problem["type"] == "extra_forbidden"
        else f"{key}: {problem['msg']}, not {problem['input']!r}"
        for problem in error.errors()
        if (key := str(problem["loc"][0]))
    ]
