"""The environments of the frameworks, each made from its lock file, once for each content of that file.

`python -m tests.frameworks.environments` writes the lock files anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["FRAMEWORKS", "python_of", "versions"]

FRAMEWORKS = {
    "agno": ["agno[mcp,openai]", "openai"],
    "google_adk": ["google-adk[mcp]"],
    "haystack": ["mcp-haystack", "haystack-ai"],
    "langchain": ["langchain-mcp-adapters", "langchain", "langchain-openai"],
    "llama_index": ["llama-index-tools-mcp", "llama-index-llms-openai"],
    "openai_agents": ["openai-agents"],
    "pydantic_ai": ["pydantic-ai-slim[mcp,openai]"],
    "smolagents": ["smolagents[mcp,openai]", "mcp<2"],
    "strands": ["strands-agents[openai]"],
}
"""What each recipe needs, by the name of the recipe."""
_OTHERS = {"registry": ["skillsaw"]}
"""A linter that holds the schemas of the MCP registry."""

_LOCKS = Path(__file__).parent / "locks"
_PYTHON = "3.11"


def versions(framework: str) -> dict[str, str]:
    """The versions in the lock file, by package."""
    lines = (_LOCKS / f"{framework}.txt").read_text().splitlines()
    return dict(line.partition(" ")[0].split("==", 1) for line in lines if "==" in line)


def python_of(framework: str) -> Path:
    """The interpreter of the framework's environment, which is made first if it is not there."""
    lock = _LOCKS / f"{framework}.txt"
    digest = hashlib.sha256(f"{sys.version}\n{lock.read_text()}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rhapsody-mcp-frameworks"
    folder = cache / f"{framework}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{framework}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _uv("venv", "--python", sys.executable, folder)
            _uv("pip", "sync", "--python", folder / "bin" / "python", lock)
            (folder / "made").touch()
    return folder / "bin" / "python"


def _uv(*words: str | Path, text: str = "") -> None:
    subprocess.run(["uv", "--quiet", *map(str, words)], input=text, text=True, check=True)


def _write_locks() -> None:
    _LOCKS.mkdir(exist_ok=True)
    options = ["--no-header", "--no-annotate", "--universal", "--python-version", _PYTHON, "--upgrade"]
    for framework, packages in {**FRAMEWORKS, **_OTHERS}.items():
        _uv("pip", "compile", *options, "-o", _LOCKS / f"{framework}.txt", "-", text="\n".join(packages))


if __name__ == "__main__":
    _write_locks()
