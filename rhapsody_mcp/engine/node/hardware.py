"""Counts the cores, GPUs and memory of this node without loading a library or running a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["count_cores", "count_gpus", "device_variables", "gpu_names", "is_host", "memory_gib", "usable_cpus"]

_GIB = 1024**3
_NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")
_AMD_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def usable_cpus() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may use; empty where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if sys.platform == "linux" else ()


def count_gpus() -> int:
    """Return the number of GPUs that this process may use."""
    return len(gpu_names())


_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""The variables that choose GPUs, of NVIDIA, AMD and Intel. With ROCR_VISIBLE_DEVICES set, HIP numbers the GPUs that
are left from 0, so that CUDA_VISIBLE_DEVICES, which HIP reads too, would choose twice."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def device_variables(cores: int, gpus: Sequence[int] | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process with so many cores, 0 for any number, and these of the GPUs that a process
    with `environment` may use; None for all of them."""
    variables = dict.fromkeys(_THREAD_VARIABLES, str(cores)) if cores else {}
    if gpus is not None:
        names = _GPU_VARIABLES[:1] if _nvidia_devices() else _GPU_VARIABLES[1:2] if _amd_devices() else _GPU_VARIABLES
        for name in names:
            known = [entry for entry in environment.get(name, "").split(",") if entry]
            variables[name] = ",".join(known[gpu] if gpu < len(known) else str(gpu) for gpu in gpus)
    return variables


def gpu_names() -> tuple[str, ...]:
    """Return the name of each GPU that this process may use: of NVIDIA GPUs, or else of AMD GPUs."""
    if nvidia_count := _nvidia_devices():
        names = tuple(_nvidia_name(file) for file in sorted(_NVIDIA_PROC.glob("*/information")))
        names = names if len(names) == nvidia_count else ("NVIDIA GPU",) * nvidia_count
        return _visible(names, "CUDA_VISIBLE_DEVICES")
    return _visible(("AMD GPU",) * _amd_devices(), "ROCR_VISIBLE_DEVICES")


def _visible(names: tuple[str, ...], variable: str) -> tuple[str, ...]:
    """Leave out the GPUs that the scheduler hides from this process through the variable."""
    if (chosen := os.environ.get(variable)) is None:
        return names
    count = len([entry for entry in chosen.split(",") if entry.strip() not in ("", "-1", "NoDevFiles")])
    return names[:count]


def _nvidia_devices() -> int:
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))


def _nvidia_name(information: Path) -> str:
    for line in information.read_text(encoding="utf-8").splitlines():
        if line.startswith("Model:"):
            return line.partition(":")[2].strip()
    return "NVIDIA GPU"


def _amd_devices() -> int:
    """Count the nodes of the topology that have SIMD units; the other nodes are CPUs."""
    nodes = _AMD_TOPOLOGY.iterdir() if _AMD_TOPOLOGY.is_dir() else ()
    return sum("simd_count 0" not in (node / "properties").read_text() for node in nodes)


def memory_gib() -> float | None:
    """Return the memory of this node in GiB; None if the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (ValueError, OSError):
        return None


def is_host(name: str | None, host: str) -> bool:
    """Return whether the name of a node, or the host_name of a policy, means the host that calls itself `host`; None
    and localhost mean any host. The name may have a user, as in "me@n1", and one of both a domain."""
    if name in (None, "localhost"):
        return True
    node = name.rpartition("@")[2]
    return host in (node, node.split(".")[0]) or node == host.split(".")[0]
