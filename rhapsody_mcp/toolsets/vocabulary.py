"""What words of other systems are called here, and who can help with what there is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rhapsody_mcp.machine import Machine, inspect_machine
from rhapsody_mcp.model.errors import nearest

__all__ = ["in_our_words"]

_WORDS = {
    "source": "code script python body",
    "function": "callable func fn",
    "executable": "command cmd program binary exe",
    "arguments": "argv",
    "args": "inputs input parameters params",
    "kwargs": "keywords named_args keyword_args",
    "after": "depends_on depends dependencies needs requires upstream",
    "env": "environment variables env_vars environ",
    "cwd": "workdir work_dir working_dir working_directory directory folder",
    "timeout_s": "timeout walltime time_limit",
    "ranks": "processes nprocs num_procs ntasks cores cpus",
    "for_each": "map items sweep repeat",
    "system_prompt": "system instructions",
    "stop_sequences": "stop",
    "json_schema": "schema response_format output_schema",
    "max_tokens": "max_new_tokens max_completion_tokens max_output_tokens",
    "retries": "attempts max_retries",
    "name": "id label title",
    "tasks": "task names ids task_ids",
    "task": "name id task_id tasks",
    "model": "llm engine",
    "num_workers": "workers cores cpus",
    "session": "id session_id",
}
"""By our name, in the order in which they are looked through."""


def in_our_words(name: str, known: Iterable[str]) -> str:
    """Which of the known names is meant, or what there is for what is asked for; empty where nothing comes near."""
    word, valid = name.casefold().replace("-", "_"), list(known)
    for ours, others in _WORDS.items():
        if ours in valid and word in others.split():
            return f" (did you mean {ours!r}?)"
    help = next((help for words, help in _HELP if word in words.split()), None)
    return nearest(name, valid) if help is None else f": {help(inspect_machine())}"


def _nodes(machine: Machine) -> str:
    return (
        f"tasks run on this one machine, {machine.host}, which has {machine.cores} cores; ranks makes a job of many "
        "processes. More nodes need another machine, on which a person sets up this server too"
    )


def _gpus(machine: Machine) -> str:
    if not machine.gpus:
        return (
            "this machine has no GPU. Prompts can go to an endpoint that has one (endpoint_url in create_session); for "
            "all else a person connects another machine"
        )
    return (
        f"this machine has {len(machine.gpus)}; a job chooses by process_templates, as in "
        '[{"ranks": 1, "policy": {"gpu_affinity": [0]}}], and prompts by device in create_session'
    )


def _memory(machine: Machine) -> str:
    there = "its memory" if machine.memory_gib is None else f"{machine.memory_gib:g} GiB"
    return (
        f"tasks share {there} of this machine, and none is set aside for one. Where that is too little, split the data "
        "with for_each, or ask the person for another machine; the server's limits are its administrator's"
    )


def _queue(_: Machine) -> str:
    return (
        "there is no batch system here; a task starts as soon as a worker is free. To run in a queue, the person or an "
        "administrator starts this server within a job of it"
    )


_HELP: list[tuple[str, Callable[[Machine], str]]] = [
    ("nodes node num_nodes nnodes hosts", _nodes),
    ("gpus gpu num_gpus ngpus gpus_per_task cuda accelerators", _gpus),
    ("memory mem memory_gb mem_gb memory_mb ram", _memory),
    ("queue partition account qos reservation", _queue),
]
