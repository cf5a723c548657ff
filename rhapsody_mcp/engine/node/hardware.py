"""Counts the cores, GPUs and memory of this node without loading a library or running a program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["count_cores", "count_gpus", "gpu_names", "is_host", "memory_gib"]

_GIB = 1024**3
_NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")
_AMD_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def count_gpus() -> int:
    """Return the number of GPUs for which a driver shows devices."""
    return len(gpu_names())


def gpu_names() -> tuple[str, ...]:
    """Return the name of each GPU: of NVIDIA GPUs, or else of AMD GPUs."""
    if nvidia_count := _nvidia_devices():
        names = tuple(_nvidia_name(file) for file in sorted(_NVIDIA_PROC.glob("*/information")))
        return names if len(names) == nvidia_count else ("NVIDIA GPU",) * nvidia_count
    return ("AMD GPU",) * _amd_devices()


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
