"""The command line, where it neither serves nor runs the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import rhapsody_mcp
from rhapsody_mcp.backends.vllm.config import read_config
from rhapsody_mcp.cli import main
from rhapsody_mcp.doctor import examine
from rhapsody_mcp.machine import Dependency, inspect_machine


def test_the_version_is_told_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from rhapsody_mcp.cli import main\ntry: main(['--version'])\nfinally: print('mcp' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [rhapsody_mcp.__version__, "False"]


@pytest.mark.parametrize("shipped", [True, False])
def test_init_writes_a_config_that_can_be_read_and_never_overwrites(
    shipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", str(tmp_path / "new"), *(["--shipped-model"] if shipped else [])]
    assert main(arguments) == 0
    file = tmp_path / "new" / "config.yaml"
    read_config(file, {})
    written = file.read_text()
    assert main(arguments) == 1
    assert "is there already; remove it, or choose another folder" in capsys.readouterr().err
    assert file.read_text() == written


def test_init_says_why_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file" / "folder")]) == 1
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_wrong_settings_file_is_told_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("wait_cap: 5")
    assert main(["stdio", "--in-process", "--config", str(tmp_path / "settings.yaml")]) == 1
    said = capsys.readouterr()
    assert "did you mean 'wait_cap_s'?" in said.err and not said.out


def test_too_few_samples_for_the_demo_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--samples", "3"])
    assert "a whole number of at least 10" in capsys.readouterr().err


def test_the_doctor_names_what_is_missing_and_how_to_get_it() -> None:
    bare = msgspec.structs.replace(
        inspect_machine(),
        dragon=Dependency("Dragon", "", "pip install dragon"),
        vllm=Dependency("vLLM", "", "pip install vllm"),
        gpus=(),
    )
    found = {finding.what: finding for finding in examine(bare)}
    assert found["vLLM"].needed and "pip install vllm" in found["vLLM"].text
    assert not found["Dragon"].needed and "sessions use the local backend" in found["Dragon"].text
    assert found["shipped model"].verdict == "there" and found["GPU"].verdict == "note"


def test_the_doctor_passes_where_the_demo_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    ready = inspect_machine().vllm.present
    assert main(["doctor"]) == (0 if ready else 1)
    assert ("Ready: rhapsody-mcp demo" in capsys.readouterr().out) is ready


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "", "two words", "-"])
def test_what_is_no_host_for_ssh_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", f"--ssh={host}"]) == 1
    said = capsys.readouterr()
    assert f"{host!r} is no host for ssh" in said.err and not said.out


@pytest.mark.parametrize("words", ["clients", "clients --bundle x.mcpb"])
def test_a_closed_stdout_is_no_error(words: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m rhapsody_mcp {words} >&-"
    ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
