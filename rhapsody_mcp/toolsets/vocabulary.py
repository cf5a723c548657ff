"""Suggests the valid name for a word of another system, or what to do where this server has no such field."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rhapsody_mcp.machine import Machine, inspect_machine
from rhapsody_mcp.model.errors import nearest
from rhapsody_mcp.schedulers.detection import choose_scheduler

__all__ = ["suggestion"]

_SYNONYMS = {
    "source": "code script python body",
    "function": "callable func fn",
    "executable": "command cmd program binary exe",
    "arguments": "argv",
    "args": "inputs input parameters params",
    "kwargs": "keywords named_args keyword_args",
    "after": "depends_on depends dependencies needs requires upstream",
    "env": "environment variables env_vars environ",
    "cwd": "workdir work_dir working_dir working_directory directory folder",
    "python": "interpreter venv virtualenv conda conda_env",
    "packages": "requirements pip pip_packages libraries",
    "container": "image docker apptainer singularity podman sif",
    "setup": "modules module module_load prologue preamble pre_script",
    "environment": "python packages container setup venv conda requirements pip image singularity apptainer modules",
    "timeout_s": "timeout walltime time_limit",
    "cores": "cpus cpu ncpus num_cpus cpus_per_task threads num_threads",
    "gpus": "gpu num_gpus ngpus gpus_per_task cuda accelerators",
    "memory_gb": "memory mem mem_gb memory_mb ram",
    "ranks": "processes nprocs num_procs ntasks",
    "ranks_per_node": "processes_per_node procs_per_node tasks_per_node ntasks_per_node ppn",
    "for_each": "map items sweep repeat",
    "system_prompt": "system instructions",
    "stop_sequences": "stop",
    "json_schema": "schema response_format output_schema",
    "max_tokens": "max_new_tokens max_completion_tokens max_output_tokens",
    "retries": "attempts max_retries",
    "retry": "rerun again resubmit requeue",
    "priority": "nice prio urgency",
    "when": "if condition run_if only_if unless",
    "name": "id label title",
    "tasks": "task names ids task_ids",
    "task": "name id task_id tasks",
    "model": "llm engine",
    "num_workers": "workers cores cpus",
    "session": "id session_id",
}
"""Words of other systems, by the name that this server uses; the first name that fits is suggested."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name that is probably meant, or what to do instead; empty where no known name is similar."""
    word, valid = name.casefold().replace("-", "_"), list(known)
    for known_name, synonyms in _SYNONYMS.items():
        if known_name in valid and word in synonyms.split():
            return f" (did you mean {known_name!r}?)"
    advice = next((advice for words, advice in _ABSENT if word in words.split()), None)
    return nearest(name, valid) if advice is None else f": {advice(inspect_machine())}"


def _has_scheduler() -> bool:
    return choose_scheduler().scheduler is not None


def _nodes(machine: Machine) -> str:
    if _has_scheduler():
        return "the session has the nodes, as with create_session(nodes=2); ranks makes a job of many processes on them"
    return (
        f"tasks run on this one machine, {machine.host}, which has {machine.cores} cores; ranks makes a job of many "
        "processes. More nodes need hosts that ssh reaches, as in create_session(nodes=2, scheduler={"
        '"hosts": ["n1", "n2"]}), or a cluster, on whose login node a person sets up this server'
    )


def _gpus(machine: Machine) -> str:
    if _has_scheduler():
        return (
            'as with create_session(nodes=1, scheduler={"gpus_per_node": 4}); tasks say how many each needs, with gpus'
        )
    if not machine.gpus:
        return (
            "this machine has no GPU. Prompts can go to an endpoint that has one (endpoint_url in create_session); for "
            "all else a person connects another machine"
        )
    return (
        f"this machine has {len(machine.gpus)}; tasks say how many each needs, with gpus, and prompts run on them by "
        "device in create_session"
    )


def _memory(machine: Machine) -> str:
    size = "its memory" if machine.memory_gib is None else f"{machine.memory_gib:g} GiB"
    return (
        f"tasks share {size} of this machine, and say how much each needs, with memory_gb. Where that is too little, "
        "split the data with for_each, or ask the person for another machine"
    )


def _queue(_: Machine) -> str:
    if _has_scheduler():
        return 'it belongs into scheduler of create_session, as in nodes=1, scheduler={"partition": "gpu"}'
    return (
        "there is no batch system here; a task starts as soon as a worker is free. To run in a queue, a person sets up "
        "this server on the login node of a cluster"
    )


_ABSENT: list[tuple[str, Callable[[Machine], str]]] = [
    ("nodes node num_nodes nnodes hosts", _nodes),
    ("gpus gpu num_gpus ngpus gpus_per_task cuda accelerators", _gpus),
    ("memory mem memory_gb mem_gb memory_mb ram", _memory),
    ("queue partition account qos reservation", _queue),
]
"""What to do about resources that tasks cannot ask for, by the words for the resource."""
