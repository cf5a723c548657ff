"""Plans tasks without running them, and lists what this machine lacks for them."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.engine.node.hardware import is_host
from rhapsody_mcp.engine.node.mpi_hint import mpi_remedies
from rhapsody_mcp.engine.task.import_check import imports_of
from rhapsody_mcp.machine import Machine
from rhapsody_mcp.model.specs import Layout, Software
from rhapsody_mcp.runtime.dataflow.for_each_values import known_count
from rhapsody_mcp.runtime.process_layout import with_software
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, ForEach, Task, kind_of, name_of, tasks_text

__all__ = ["PlannedTask", "plan_tasks", "unknown_nodes", "unmet_needs"]

_MANY = 1_000_000


class PlannedTask(msgspec.Struct, frozen=True):
    """A task of a plan.

    `after` are the names of the tasks that it waits for. `level` is 1 for a task that can start at once, else 1 more
    than the highest level among the tasks that it waits for.
    """

    task: Task
    runs_as: str
    after: tuple[str, ...]
    level: int


def unknown_nodes(machine: Machine, gpus_per_node: int) -> Machine:
    """This machine in the place of nodes that an allocation will have: their names and cores are not known, nor their
    GPUs where `gpus_per_node` is 0."""
    return replace(machine, host="", cores=_MANY, gpus=("unknown",) * (gpus_per_node or _MANY))


def plan_tasks(
    tasks: Sequence[Task],
    machine: Machine,
    software: Software = Software(),  # noqa: B008
) -> list[PlannedTask]:
    """The plan of one submission, in its order; `software` is that of tasks that name none. The tasks must have no
    cycle."""
    uids = {task.uid for task in tasks}
    sources = {task.uid: {source.uid for source in task.sources()} & uids for task in tasks}
    levels: dict[str, int] = {}
    for uid in TopologicalSorter(sources).static_order():
        levels[uid] = 1 + max((levels[source] for source in sources[uid]), default=0)
    planned = {task.uid: _planned(task, machine, software) for task in tasks}
    return [PlannedTask(task, planned[task.uid], _source_names(task), levels[task.uid]) for task in tasks]


def _planned(task: Task, machine: Machine, software: Software) -> str:
    if (when := task.when) is None and isinstance(task, ForEach) and task.children:
        when = task.children[0].when
    return _runs_as(task, machine, software) + (f", only when {when.subject} {when.comparison}" if when else "")


def _source_names(task: Task) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name_of(source) for source in task.sources()))


def _runs_as(task: Task, machine: Machine, software: Software) -> str:
    if isinstance(task, ForEach):
        if task.source is not None:
            count = known_count(task.source)
            return f"a task for each item of {name_of(task.source.task)}" + (
                f", {count} now" if count is not None else ""
            )
        each = (
            f", {'each ' * (len(task.children) != 1)}{_runs_as(task.children[0], machine, software)}"
            if task.children
            else ""
        )
        return f"{tasks_text(len(task.children))}{each}"
    if isinstance(task, AITask):
        return "a chat" if task.messages else f"{len(task.prompt)} prompts" if task.many else "a prompt"
    assert isinstance(task, ComputeTask)
    own = task.layout.software.over(software)
    layout = with_software(task.layout, own)
    job = "an MPI job" if layout.pmi not in (None, "none") else "a job"
    kind = "an executable" if kind_of(task) == "executable" else "a function"
    crowded = f", which share {machine.cores} cores" if layout.ranks > machine.cores else ""
    return _LAYOUTS[layout.mode].format(kind=kind, job=job, ranks=layout.ranks) + crowded + _software_text(own)


def _software_text(software: Software) -> str:
    """As in `, with /opt/env, after 2 setup lines`."""
    parts = [f"after {len(software.setup)} setup line{'s'[: len(software.setup) > 1]}"] if software.setup else []
    parts += [f"in {software.container}"] if software.container else []
    parts += [f"with {software.python}"] if software.python else []
    parts += [f"with {', '.join(software.packages)}, installed before"] if software.packages else []
    return "".join(f", {part}" for part in parts)


_LAYOUTS = {
    "native": "a function in a worker",
    "process": "{kind} in a process of its own",
    "job": "{job} of {ranks} processes",
}


def unmet_needs(
    task: Task,
    machine: Machine,
    folder: str = "",
    software: Software = Software(),  # noqa: B008
) -> Iterator[str]:
    """Sentences about what a task needs and this machine lacks; `folder` is the working directory of the session, and
    `software` that of tasks that name none. What a task with software of its own finds there is not known.

    No user code runs, and no module is imported.
    """
    if isinstance(task, ForEach):
        yield from unmet_needs(task.children[0], machine, folder, software) if task.children else ()
    elif isinstance(task, ComputeTask):
        yield from _unmet_layout_needs(task.layout, machine, folder)
        if task.layout.software.over(software):
            return
        if task.executable is not None:
            yield from _unmet_program_needs(task.executable, task.layout, folder)
        yield from (
            f"no module {name!r} is installed here: give packages, python or setup"
            for name in _imported_packages(task)
            if not _is_importable(name)
        )


def _unmet_layout_needs(layout: Layout, machine: Machine, folder: str) -> Iterator[str]:
    if layout.pmi not in (None, "none") and not machine.pmi:
        yield f"no PMIx or Cray PMI library was found here, through which MPI ranks find each other. {mpi_remedies()}"
    owner = "this machine" if machine.host else "each node"
    for template in (group.template for group in layout.groups):
        if template.cwd is not None and not os.path.isdir(cwd := os.path.join(folder, template.cwd)):
            yield f"cwd {cwd} is no folder here"
        if machine.host and not is_host(template.host_name, machine.host):
            yield f"host {template.host_name!r} is no node of this session, which runs on {machine.host}"
        if any(number >= len(machine.gpus) for number in template.gpu_affinity):
            yield f"GPU {max(template.gpu_affinity)} was asked for, and {owner} has {len(machine.gpus) or 'none'}"


def _unmet_program_needs(executable: str, layout: Layout, folder: str) -> Iterator[str]:
    template = layout.groups[0].template
    path = template.env.get("PATH")
    file = str(Path(folder, template.cwd or "", executable)) if "/" in executable else executable
    if shutil.which(file, path=path) is None:
        hint = "; executable is the program alone, what follows it goes into arguments" if " " in executable else ""
        yield f"{executable} is no program here{hint}"


def _imported_packages(task: ComputeTask) -> list[str]:
    """The top-level packages that the import statements of the function name."""
    if isinstance(task.function, Module):
        return [task.function.path.partition(":")[0].partition(".")[0]]
    if not isinstance(task.function, Source):
        return []
    packages: list[str] = []
    for statement in imports_of(ast.parse(task.function.text)):
        names = (
            [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
        )
        packages += [name.partition(".")[0] for name in names]
    return [name for name in dict.fromkeys(packages) if name]


def _is_importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return True
