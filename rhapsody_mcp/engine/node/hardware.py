"""What this node has: cores, GPUs, memory. No library is loaded, and no program is run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

__all__ = ["count_cores", "count_gpus", "gpu_names", "memory_gib", "this_host"]

_GIB = 1024**3
_NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")
_AMD_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


def count_cores() -> int:
    """The cores of this node that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def count_gpus() -> int:
    """The GPUs of this node for which a driver shows devices."""
    return len(gpu_names())


def gpu_names() -> tuple[str, ...]:
    """The name of each of these GPUs, NVIDIA's or else AMD's."""
    if nvidia := _nvidia_devices():
        named = tuple(_name(file) for file in sorted(_NVIDIA_PROC.glob("*/information")))
        return named if len(named) == nvidia else ("NVIDIA GPU",) * nvidia
    return ("AMD GPU",) * _amd_devices()


def _nvidia_devices() -> int:
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))


def _name(information: Path) -> str:
    for line in information.read_text(encoding="utf-8").splitlines():
        if line.startswith("Model:"):
            return line.partition(":")[2].strip()
    return "NVIDIA GPU"


def _amd_devices() -> int:
    """Nodes of the topology with SIMD units; the others are CPUs."""
    nodes = _AMD_TOPOLOGY.iterdir() if _AMD_TOPOLOGY.is_dir() else ()
    return sum("simd_count 0" not in (node / "properties").read_text() for node in nodes)


def memory_gib() -> float | None:
    """The memory of this node; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (ValueError, OSError):
        return None


def this_host(name: str | None) -> bool:
    """Whether a policy's host_name means this node."""
    return name in (None, socket.gethostname(), socket.gethostname().split(".")[0], "localhost")
