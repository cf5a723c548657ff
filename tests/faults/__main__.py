"""Runs the whole fault matrix, and shows it. Arguments are pytest's: `-k worker`, `--markdown FILE`.

python -m tests.faults
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), *sys.argv[1:]]))
