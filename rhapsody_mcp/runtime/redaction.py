"""Removes secrets from texts and arguments that are logged, and limits their size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "looks_secret", "redacted", "summary"]

HIDDEN = "(secret)"
_SHOWN_CHARS, _ARGUMENT_CHARS, _SCANNED_CHARS = 200, 80, 600
_MIN_KEYS, _MAX_DEPTH = 12, 8
_NOT_SECRET = {"idempotency_key"}
_HASHED = {"source", "prompt", "system_prompt", "content"}
"""Arguments that a summary shows as length and hash, so that equal values can be recognised."""
_SECRET_WORDS = {"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PAT", "CREDENTIAL", "AUTH"}
_SECRET_ENDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS")
_SECRET_NAMES = r"[\w-]{0,40}(?:api[-_]?key|token|secret|password|passwd|passphrase|credentials?)"
_PATTERNS = [
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/-]{8,}=*"), rf"\1 {HIDDEN}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^\s/@'\"]{0,500}@"), rf"\1{HIDDEN}@"),
    (
        re.compile(rf"(?i)({_SECRET_NAMES}[\"']?\s*[=:]\s*)(?!{re.escape(HIDDEN)})(\"[^\"]*\"|'[^']*'|[^\s,;&]+)"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?i)(--?{_SECRET_NAMES}\s+)[^\s-]\S*"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:rh_|sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{12,}"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), HIDDEN),
]


def looks_secret(variable: str) -> bool:
    """Whether the name of an environment variable suggests that its value is a secret."""
    words = variable.upper().split("_")
    return bool(_SECRET_WORDS & set(words)) or words[-1].endswith(_SECRET_ENDS)


def redacted(text: str) -> str:
    """The text with HIDDEN in the place of tokens, passwords, keys and credentials in URLs."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def summary(arguments: Mapping[str, Any], max_chars: int = 2000) -> dict[str, Any]:
    """The arguments of a call for a log: no secrets, long texts cut, code as a hash, only the first items of lists.

    Where the JSON form is longer than `max_chars`, each long argument is replaced by its length and hash.
    """
    for max_items in (20, 5, 1):
        shortened: dict[str, Any] = _plain(arguments, max_items)
        if len(json.dumps(shortened)) <= max_chars:
            return shortened
    values = list(arguments.values())[: len(shortened)]
    return {key: _shorten(shortened[key], value) for key, value in zip(shortened, values, strict=False)}


def _shorten(shortened: Any, value: Any) -> Any:
    return (
        shortened if len(json.dumps(shortened)) <= _ARGUMENT_CHARS else _length_and_hash(json.dumps(value, default=str))
    )


def _plain(value: Any, max_items: int, depth: int = 0, key: str = "") -> Any:
    if key not in _NOT_SECRET and looks_secret(key.replace("-", "_")):
        return HIDDEN if value is not None else None
    if isinstance(value, str):
        return _length_and_hash(value) if key in _HASHED else _cut_text(value)
    if depth == _MAX_DEPTH and isinstance(value, Mapping | Sequence):
        return "..."
    if isinstance(value, Mapping):
        items = [(name, value[name]) for name, _ in zip(value, range(max(max_items, _MIN_KEYS)), strict=False)]
        shown = {_cut_text(str(name)): _plain(item, max_items, depth + 1, str(name)) for name, item in items}
        return shown | ({"...": f"{len(value) - len(items)} more"} if len(value) > len(items) else {})
    if isinstance(value, Sequence):
        return _plain_list(value, max_items, depth)
    return value


def _plain_list(items: Sequence[Any], max_items: int, depth: int) -> list[Any]:
    """A list without secrets. The item after an option such as `--api-key` is a secret."""
    shown = [
        HIDDEN if isinstance(item, str) and _is_secret_option(before) else _plain(item, max_items, depth + 1)
        for before, item in zip(["", *items[:max_items]], items[:max_items], strict=False)
    ]
    return shown + ([f"... {len(items) - max_items} more"] if len(items) > max_items else [])


def _is_secret_option(item: Any) -> bool:
    return isinstance(item, str) and item.startswith("-") and "=" not in item and looks_secret(item.replace("-", "_"))


def _cut_text(text: str) -> str:
    """The first characters of a text, redacted before the cut: the pattern of a token does not match half a token."""
    shown = redacted(text[:_SCANNED_CHARS])
    is_complete = len(text) <= _SCANNED_CHARS and len(shown) <= _SHOWN_CHARS
    return shown if is_complete else f"{shown[:_SHOWN_CHARS]} ... ({_length_and_hash(text)})"


def _length_and_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{len(text)} characters, sha256 {digest[:16]}"
