"""Settings that a client of the service may choose for itself, and how files differ from the service's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rhapsody_mcp.model.errors import InvalidSettings, refuse_unknown
from rhapsody_mcp.settings import Settings, read_settings

__all__ = ["changed_settings", "client_settings", "differing_keys"]

_CLIENT_KEYS = ("read_only", "toolsets", "http_token_file", "http_allowed_hosts")
"""All other settings are those with which the service was started."""


def client_settings(service: Settings, choice: dict[str, Any]) -> Settings:
    """The service's settings with a client's choice. Raises InvalidRequest and InvalidSettings."""
    refuse_unknown("setting of a client", choice, _CLIENT_KEYS)
    try:
        return Settings(**{**dict(service), **choice})
    except ValidationError as error:
        raise InvalidSettings(f"the service cannot offer this: {error.errors()[0]['msg']}.") from error


def differing_keys(settings: Settings, others: Settings) -> str:
    """The keys with different values, separated by commas."""
    return ", ".join(key for key, value in settings if value != getattr(others, key))


def changed_settings(service: Settings, file: Path | None) -> str:
    """The keys that `file` has changed since the service started, or why it cannot be read; empty without a change."""
    try:
        return differing_keys(service, read_settings(file))
    except InvalidSettings as error:
        return str(error)
