"""A task that runs a function or a program."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from rhapsody_mcp.model.errors import InvalidTask, refuse_other_fields, refuse_unknown
from rhapsody_mcp.model.specs import Call, Command, TaskSpec
from rhapsody_mcp.runtime.process_layout import read_layout, read_timeout, refuse_half_characters
from rhapsody_mcp.runtime.serialization import Encoder, Module, Source, are_plain
from rhapsody_mcp.runtime.tasks.task import COMMON_FIELDS, Part, Task, Text, content, tasks_in

__all__ = ["ComputeTask"]

_COMPUTE_FIELDS = (
    *("function", "executable", "args", "kwargs", "arguments", "stdout", "outputs"),
    "task_backend_specific_kwargs",
)
_PLACES = {
    "cwd": 'task_backend_specific_kwargs={"process_template": {"cwd": ...}}',
    "env": 'task_backend_specific_kwargs={"process_template": {"env": {...}}}',
    "timeout": 'task_backend_specific_kwargs={"timeout": seconds}',
    "cores": 'task_backend_specific_kwargs={"cores": 4}',
    "gpus": 'task_backend_specific_kwargs={"gpus": 1}',
    "memory_gb": 'task_backend_specific_kwargs={"memory_gb": 8}',
    "python": 'task_backend_specific_kwargs={"python": "/home/me/env"}',
    "packages": 'task_backend_specific_kwargs={"packages": ["humanize==4.*"]}',
    "container": 'task_backend_specific_kwargs={"container": "image.sif"}',
    "setup": 'task_backend_specific_kwargs={"setup": ["module load cuda"]}',
    "ranks": 'task_backend_specific_kwargs={"process_templates": [(ranks, {})]}',
    "shell": 'executable="sh", arguments=["-c", "..."]',
    "capture_stdio": "task.stdout and task.stderr, which are always kept",
    "input_files": "arguments, or args, with full paths, or with tasks whose outputs they are",
    "output_files": 'outputs=["result.json"]',
}
_SYNONYMS = {
    "cpu_threads": "cores",
    "environment": "env",
    "gpu": "gpus",
    "memory": "memory_gb",
    "working_directory": "cwd",
}
_PLACES |= {synonym: _PLACES[name] for synonym, name in _SYNONYMS.items()}
"""Field names of other libraries, and how ComputeTask expresses them."""


class ComputeTask(Task):
    """A function or a program to run.

    function      any callable, sync or async; it runs to completion, and `return_value` is its value
    args, kwargs  the arguments of the function; a task in them, at any depth, stands for the return value of that
                  task; a task in place of kwargs stands for a dict of all keyword arguments
    executable    a path, or a name on PATH; `return_value` is the standard output without outer white space, or as
                  bytes where the output is not UTF-8 text
    arguments     the arguments of the program; a task among them stands for its return value, as text or as JSON; a
                  Text holds results
    stdout        "json": the standard output of the program is one JSON document, and `return_value` is what that says
    outputs       patterns of files that it leaves in its working directory, as in ["result.json", "plots/*.png"];
                  `return_value` is then {"result": the value, "files": a dict of paths of copies by name, with one
                  more dict for each folder}. The copies are kept as long as the session
    task_backend_specific_kwargs
        process_template   a dict (env, cwd, policy): a process of its own
        process_templates  a list of (ranks, dict): a job of several processes
        ranks_per_node     the most ranks of a job on each node; default: as many as have free slots there
        type, ranks        "mpi" and a number: a job whose ranks speak MPI; pmi: "auto", "pmix", "cray", "none"
        cores, gpus, memory_gb   what the task, or each rank of a job, needs; a function with any of them has a process
                           of its own. Whole cores are bound; a part of a core, as in 0.5, is counted. A task that uses
                           more memory ends FAILED with cause memory
        python             an interpreter of Python 3.10 or later, or the folder of an environment, which needs nothing
                           else: a function runs in it, and a program finds it first on PATH
        packages           requirements; an environment with them is made once, of `python` or else of this Python
        container          an image of Apptainer, Singularity or Podman
        setup              lines of bash that run before it; where one fails, the task ends FAILED with cause invalid
        timeout            seconds, in every mode
    """

    kind = "compute"
    stdout_form: Literal["text", "json"] | None = None
    outputs: tuple[str, ...] = ()

    def __init__(
        self,
        function: Callable[..., Any] | Source | Module | None = None,
        *,
        executable: str | os.PathLike[str] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | Task | Part | None = None,
        arguments: Sequence[Any] = (),
        stdout: Literal["text", "json"] | None = None,
        outputs: Sequence[str] = (),
        task_backend_specific_kwargs: Mapping[str, Any] | None = None,
        **common: Any,
    ) -> None:
        refuse_other_fields("ComputeTask", common, _PLACES)
        refuse_unknown("field of ComputeTask", common.keys() - COMMON_FIELDS, (*_COMPUTE_FIELDS, *COMMON_FIELDS))
        super().__init__(**common)
        self.function = function
        self.executable = os.fspath(executable) if isinstance(executable, os.PathLike) else executable
        self.args = _items("args", args)
        self.kwargs = kwargs if isinstance(kwargs, Task | Part) else dict(kwargs or {})
        self.arguments = _items("arguments", arguments)
        if stdout is not None:
            self.stdout_form = stdout
        if checked := _checked_outputs(outputs):
            self.outputs = checked
        self.task_backend_specific_kwargs = dict(task_backend_specific_kwargs or {})
        self.layout = read_layout(self.task_backend_specific_kwargs, native=function is not None)
        self._timeout_s = read_timeout(self.task_backend_specific_kwargs)
        self._check()

    def _check(self) -> None:
        if (self.function is None) == (self.executable is None):
            raise InvalidTask("a ComputeTask has either function= or executable=, one of the two.")
        if self.executable is None:
            self._check_function()
        else:
            self._check_program(self.executable)

    def _check_function(self) -> None:
        if self.stdout_form is not None:
            raise InvalidTask(
                "stdout= belongs to an executable; the value of a function is what it returns.", field="stdout"
            )
        if self.arguments:
            raise InvalidTask(
                "arguments= belongs to an executable; a function takes args= and kwargs=.", field="arguments"
            )
        if callable(self.function):
            return
        if not isinstance(self.function, Source | Module):
            hint = ' A program goes in as executable="...", with arguments=[...].' * isinstance(self.function, str)
            raise InvalidTask(
                f"function= is a {type(self.function).__name__}, which cannot be called.{hint}", field="function"
            )
        if isinstance(self.function, Source) and isinstance(self.kwargs, dict):
            self.function.check_arguments(self.args, self.kwargs)

    def _check_program(self, executable: str) -> None:
        if self.stdout_form not in (None, "text", "json"):
            raise InvalidTask(f'stdout is {self.stdout_form!r}; valid: "text", "json".', field="stdout")
        if not executable.strip() or "\0" in executable:
            raise InvalidTask(f"executable is {executable!r}; valid is a path, or a name on PATH.", field="executable")
        if with_nul := [text for text in self.arguments if isinstance(text, str) and "\0" in text]:
            raise InvalidTask(
                f"{with_nul[0][:80]!r} among arguments holds a NUL character, which no program can get.",
                field="arguments",
            )
        if any(isinstance(item, bytes | bytearray) for item in self.arguments):
            raise InvalidTask(
                "arguments holds bytes; valid is text, which a program gets as UTF-8, or a task.", field="arguments"
            )
        if any(any(tasks_in(item)) for item in self.arguments if not isinstance(item, Task | Part | Text)):
            raise InvalidTask(
                "arguments holds a task inside a list or a dict; a task is an argument of its own.", field="arguments"
            )
        for field, text in (("executable", executable), *(("arguments", item) for item in self.arguments)):
            if isinstance(text, str):
                refuse_half_characters(field, text)
        if self.args or self.kwargs:
            raise InvalidTask(
                "args= and kwargs= belong to a function; an executable takes arguments=[...].", field="args"
            )

    @property
    def what(self) -> str:
        if self.executable is not None:
            return self.executable
        if isinstance(self.function, Source):
            return self.function.function_name
        return self.function.path if isinstance(self.function, Module) else getattr(self.function, "__name__", "")

    def _find_needs(self) -> Iterable[Task]:
        if not self.kwargs and not self.arguments and are_plain(self.args):
            return ()
        return itertools.chain.from_iterable(map(tasks_in, (self.args, self.kwargs, self.arguments)))

    def spec(self, encoder: Encoder) -> TaskSpec:
        work: Call | Command
        if self.function is not None:
            work = encoder.call(self.function, self.args, self.kwargs, self.outputs)
        else:
            arguments = tuple(map(content, self.arguments))
            work = Command(self.executable or "", arguments, self.stdout_form or "text", self.outputs)
        return TaskSpec(uid=self.uid, work=work, layout=self.layout, timeout_s=self._timeout_s, priority=self.priority)


def _items(field: str, items: Sequence[Any]) -> tuple[Any, ...]:
    """A text is a sequence too, of its letters."""
    if isinstance(items, str | bytes):
        raise InvalidTask(f"{field} is a text; valid is a list, as in {field}=[{items[:80]!r}].", field=field)
    return tuple(items)


def _checked_outputs(patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise InvalidTask(f"outputs is a list of patterns, as in [{patterns!r}].", field="outputs")
    for pattern in patterns:
        refuse_half_characters("outputs", pattern)
        path = PurePosixPath(pattern)
        if not path.parts or "\0" in pattern or path.is_absolute() or ".." in path.parts:
            raise InvalidTask(
                f"{pattern!r} in outputs is no pattern of files below the working directory; write it as in "
                '"result.json" or "plots/*.png". A file elsewhere is given out by its path, as a result.',
                field="outputs",
            )
    return tuple(patterns)
