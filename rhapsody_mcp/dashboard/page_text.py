"""Puts the page together: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
import html
import re
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

__all__ = ["json_bytes", "page_html", "report_html"]

_SCRIPTS = ("uplot", "util", "spans", "stream", "charts", "graph", "sources", "detail", "main")
_POLICY = (
    "default-src 'none'; script-src '{hash}'; style-src 'unsafe-inline'; img-src data: blob:; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)
"""No script but the page's own runs, so that no text can become one; elements set styles of their own."""


@cache
def _read(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = "\n".join(_read(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n{parts}'


@cache
def page_html(source: Literal["http", "app"]) -> str:
    """The page that gets its data from the server over HTTP, or as an MCP App from its host."""
    return _page(source, "Rhapsody", "")


def report_html(data: dict[str, Any]) -> str:
    """The page with its data in it, which needs no server."""
    text = json_bytes(data).decode().replace("<", "\\u003c")  # no text can end the element
    title = html.escape(f"{data['head']['session']} - Rhapsody")
    return _page("file", title, f'<script type="application/json" id="data">{text}</script>\n')


def json_bytes(data: object) -> bytes:
    """Data as JSON; half characters, as in the name of a task that is made of a file's name, are replaced."""
    try:
        return msgspec.json.encode(data)
    except UnicodeEncodeError:
        return msgspec.json.encode(_whole(msgspec.to_builtins(data)))


def _whole(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, dict):
        return {_whole(key): _whole(value) for key, value in data.items()}
    return [_whole(item) for item in data] if isinstance(data, list) else data


def _page(source: str, title: str, data: str) -> str:
    script = _script()
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "source": source,
        "title": title,
        "policy": _POLICY.format(hash=f"sha256-{digest}", connect="'self'" if source == "http" else "'none'"),
        "style": f"{_read('uplot.css')}\n{_read('style.css')}",
        "script": script,
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))
