"""What an MCP client has to be told to use this server: a command line, a link, lines of its settings, or a bundle."""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rhapsody_mcp import __version__
from rhapsody_mcp.cards import read_cards
from rhapsody_mcp.model.errors import InvalidRequest

__all__ = ["NAME", "entries", "server_command", "write_bundle"]

NAME = "rhapsody"
"""The name of the server in clients."""
_MANIFEST_VERSION = "0.3"
"""https://github.com/anthropics/mcpb/blob/main/MANIFEST.md"""


def server_command(host: str | None = None) -> list[str]:
    """The command that serves one client, with the full path of this installation; over ssh where a host is named.

    Raises InvalidRequest for what ssh would not take for a host.
    """
    command = [str(Path(sys.executable).parent / "rhapsody-mcp"), "stdio"]
    if host is not None and not re.fullmatch(r"[^\s-]\S*", host):
        raise InvalidRequest(f"{host!r} is no host for ssh; give one that it reaches, as in login.example.org.")
    return command if host is None else ["ssh", host, shlex.join(command)]


def entries(command: Sequence[str]) -> dict[str, str]:
    """By the name of a client, the line to run, the link to open, or the lines to put in a file."""
    program, arguments = command[0], list(command[1:])
    server = {"command": program, "args": arguments}
    named = {"name": NAME, **server}
    config = base64.b64encode(_compact(server).encode()).decode()
    return {
        "Claude Code": f"claude mcp add {NAME} -- {shlex.join(command)}",
        "Codex": f"codex mcp add {NAME} -- {shlex.join(command)}",
        "Gemini CLI": f"gemini mcp add {NAME} {shlex.join(command)}",
        "Cursor": f"cursor://anysphere.cursor-deeplink/mcp/install?name={NAME}&config={quote(config, safe='')}",
        "VS Code": f"vscode:mcp/install?{quote(_compact(named), safe='')}",
        "Claude Desktop, and most others (JSON)": json.dumps({"mcpServers": {NAME: server}}),
    }


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def write_bundle(file: Path, command: Sequence[str]) -> None:
    """Write a bundle (.mcpb) that Claude Desktop installs. It holds no program: it starts the command, which the person
    who installs it may change. Raises OSError."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("manifest.json", json.dumps(_manifest(command), indent=2))


def _manifest(command: Sequence[str]) -> dict[str, Any]:
    cards = read_cards()
    return {
        "manifest_version": _MANIFEST_VERSION,
        "name": "rhapsody-mcp",
        "display_name": "Rhapsody",
        "version": __version__,
        "description": "Runs functions, programs, parallel jobs and language-model prompts on an HPC machine.",
        "author": {"name": "The rhapsody-mcp authors"},
        "license": "MIT",
        "keywords": ["hpc", "slurm", "mpi", "vllm", "workflows"],
        "server": {
            "type": "binary",
            "entry_point": command[0],
            "mcp_config": {"command": "${user_config.program}", "args": list(command[1:]), "env": {}},
        },
        "tools": [{"name": card.name, "description": card.text.partition("\n")[0]} for card in cards],
        "user_config": {
            "program": {
                "type": "string",
                "title": "Program",
                "description": "The full path of the program that is started.",
                "default": command[0],
                "required": True,
            }
        },
        "compatibility": {"platforms": ["darwin", "win32", "linux"]},
    }
