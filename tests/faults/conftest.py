"""Gathers what came of each row, and shows the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.matrix import Matrix


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--markdown", type=Path, metavar="FILE", help="write the matrix there, as a table in Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Matrix(config.getoption("markdown")))
