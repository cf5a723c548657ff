"""The commands that install what is missing."""

from __future__ import annotations

__all__ = ["vllm_install_command"]

_CPU_TORCH = "--no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
"""PyTorch's build for the CPU, which vLLM's needs and the standard index does not have."""


def vllm_install_command(*, gpu: bool) -> str:
    """The command for vLLM's build for GPUs, or for the CPU."""
    return 'pip install "rhapsody-mcp[gpu]"' if gpu else f'pip install {_CPU_TORCH} && pip install "rhapsody-mcp[cpu]"'
