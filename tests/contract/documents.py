"""The README and the files of docs/, and what stands in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "blocks", "run_example"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
"""Their texts, by their paths."""


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[document], re.M | re.S)


def run_example(text: str, folder: Path) -> str:
    """Run a Python block in a folder; its standard output."""
    script = folder / "example.py"
    script.write_text(text, encoding="utf-8")
    ended = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
