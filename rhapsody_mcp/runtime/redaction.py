"""Takes secrets out of what is written down, and cuts it to a bounded size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "looks_secret", "redacted", "summary"]

HIDDEN = "(secret)"
_TEXT_CHARS, _SHORT_CHARS, _LOOKED_AT = 200, 80, 600
_KEYS, _DEPTH = 12, 8
_PUBLIC = {"idempotency_key"}
_SOURCES = {"source", "prompt", "system_prompt", "content"}
"""Arguments that are told by length and hash alone: what two calls have in common shows, and no more."""
_SECRET_WORDS = {"KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PAT", "CREDENTIAL", "AUTH"}
_SECRET_ENDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS")
_NAMES = r"[\w-]{0,40}(?:api[-_]?key|token|secret|password|passwd|passphrase|credentials?)"
_PATTERNS = [
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/-]{8,}=*"), rf"\1 {HIDDEN}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^\s/@'\"]{0,500}@"), rf"\1{HIDDEN}@"),
    (
        re.compile(rf"(?i)({_NAMES}[\"']?\s*[=:]\s*)(?!{re.escape(HIDDEN)})(\"[^\"]*\"|'[^']*'|[^\s,;&]+)"),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?i)(--?{_NAMES}\s+)[^\s-]\S*"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:rh_|sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{12,}"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), HIDDEN),
]


def looks_secret(variable: str) -> bool:
    """Whether the name of an environment variable says that its value is nobody's business."""
    words = variable.upper().split("_")
    return bool(_SECRET_WORDS & set(words)) or words[-1].endswith(_SECRET_ENDS)


def redacted(text: str) -> str:
    """Without what looks like a token, a password, a key or the credentials in an address."""
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def summary(arguments: Mapping[str, Any], max_chars: int = 2000) -> dict[str, Any]:
    """Arguments of a call as they may be written down: no secrets, long texts cut, code by its hash, the first of
    many items, and as JSON about `max_chars` at most, or else each argument by its hash and length."""
    for most in (20, 5, 1):
        told: dict[str, Any] = _plain(arguments, most)
        if len(json.dumps(told)) <= max_chars:
            return told
    values = list(arguments.values())[: len(told)]
    return {key: _short(told[key], value) for key, value in zip(told, values, strict=False)}


def _short(told: Any, value: Any) -> Any:
    return told if len(json.dumps(told)) <= _SHORT_CHARS else _identity(json.dumps(value, default=str))


def _plain(value: Any, most: int, depth: int = 0, key: str = "") -> Any:
    if key not in _PUBLIC and looks_secret(key.replace("-", "_")):
        return HIDDEN if value is not None else None
    if isinstance(value, str):
        return _identity(value) if key in _SOURCES else _cut(value)
    if depth == _DEPTH and isinstance(value, Mapping | Sequence):
        return "..."
    if isinstance(value, Mapping):
        few = [(name, value[name]) for name, _ in zip(value, range(max(most, _KEYS)), strict=False)]
        shown = {_cut(str(name)): _plain(item, most, depth + 1, str(name)) for name, item in few}
        return shown | ({"...": f"{len(value) - len(few)} more"} if len(value) > len(few) else {})
    if isinstance(value, Sequence):
        return _listed(value, most, depth)
    return value


def _listed(items: Sequence[Any], most: int, depth: int) -> list[Any]:
    """What follows an option such as `--api-key` is as secret as what it is the name of."""
    shown = [
        HIDDEN if isinstance(item, str) and _is_secret_option(before) else _plain(item, most, depth + 1)
        for before, item in zip(["", *items[:most]], items[:most], strict=False)
    ]
    return shown + ([f"... {len(items) - most} more"] if len(items) > most else [])


def _is_secret_option(item: Any) -> bool:
    return isinstance(item, str) and item.startswith("-") and "=" not in item and looks_secret(item.replace("-", "_"))


def _cut(text: str) -> str:
    """Redacted before it is cut: half a token is not seen to be one."""
    shown = redacted(text[:_LOOKED_AT])
    whole = len(text) <= _LOOKED_AT and len(shown) <= _TEXT_CHARS
    return shown if whole else f"{shown[:_TEXT_CHARS]} ... ({_identity(text)})"


def _identity(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{len(text)} characters, sha256 {digest[:16]}"
