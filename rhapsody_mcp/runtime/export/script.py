"""Writes a Python script that repeats the tasks of a session."""

from __future__ import annotations

import ast
import keyword
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from rhapsody_mcp import __version__
from rhapsody_mcp.backends import BACKENDS
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.specs import Software
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.backend_factory import BackendPlan
from rhapsody_mcp.runtime.export.function_source import SourceWriter
from rhapsody_mcp.runtime.export.literals import Code, write_call, write_value
from rhapsody_mcp.runtime.export.script_functions import NEEDED_NAMES, SCRIPT_FUNCTIONS
from rhapsody_mcp.runtime.export.task_code import TaskCode, representative
from rhapsody_mcp.runtime.export.task_selection import also_after, by_need, repeatable, submissions, unwritable
from rhapsody_mcp.runtime.redaction import HIDDEN, looks_secret, redacted
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Task, kind_of, leaves, name_of, tasks_text

__all__ = ["Script", "has_random_answers", "without_credentials", "write_script"]

_IMPORTS = ("asyncio", "json", "math", "os", "msgspec")
_API = ("AITask", "ComputeTask", "Condition", "ForEach", "Module", "Part", "Session", "Source", "Text")
_MAIN = """\
if __name__ == "__main__":
    print(json.dumps(asyncio.run(repeat()), indent=1))
"""
_WIDTH, _MAX_SUSPECTS, _MAX_NODES = 80, 10, 8
_LIST_SEPARATOR = re.compile(r"[\"'],\s*[\"']")
_NODES_HERE = 'int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))'
_OWN_NAMES = "repeat = session = results = item = task = label = _ = None"


class Script(msgspec.Struct, frozen=True):
    """A script, and counts of tasks. `tasks` are in the script; the others are left out.

    `left_out` were canceled, `replaced` were replaced by tasks of the same name, and `unwritable` cannot be written as
    code. `secrets` are the environment variables that the script needs.
    """

    text: str
    tasks: int
    left_out: int
    replaced: int
    unwritable: int
    secrets: tuple[str, ...]


def write_script(
    id: str,
    tasks: Sequence[Task],
    backends: Sequence[Backend],
    plans: Sequence[BackendPlan],
    folder: str = "",
    software: Software = Software(),  # noqa: B008
) -> Script:
    """A script that runs the tasks on the planned backends in `folder`, and prints the outcome of each task as JSON.

    The script submits the tasks in the same order. Before it submits a task, it waits for the tasks that had ended when
    the task was submitted, because the task may use their files. Left out are tasks that were canceled on request,
    tasks that cannot be written as code, tasks that need a task that is left out, and replaced tasks that no task of
    the script uses. A task that came after a task that is left out comes after the sources of that task. Tasks that
    were canceled because a source failed are in the script.
    """
    return _ScriptWriter(id, tasks, backends, plans, folder, software).write()


def has_random_answers(task: Task) -> bool:
    """Whether the answers of a model may differ from run to run."""
    return isinstance(task, AITask) and task.temperature != 0 and task.seed is None


def without_credentials(url: str) -> str:
    """A URL without user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class _ScriptWriter:
    def __init__(
        self,
        id: str,
        tasks: Sequence[Task],
        backends: Sequence[Backend],
        plans: Sequence[BackendPlan],
        folder: str,
        software: Software,
    ) -> None:
        self._software = msgspec.to_builtins(software)
        self._id, self._backends, self._plans, self._folder = id, backends, plans, folder
        candidates = repeatable(tasks)
        kept = {task.uid for task in candidates}
        self._replaced = sum(task.replaced_by is not None for task in tasks if task.uid not in kept)
        self._left_out = len(tasks) - len(candidates) - self._replaced
        self._unwritable = unwritable(candidates)
        self._tasks = [task for task in candidates if task.uid not in self._unwritable]
        self._representatives = {task.uid: representative(task) for task in self._tasks}
        self._classes = sorted({BACKENDS[plan.name].class_name for plan in plans})
        every_name = {*_IMPORTS, *_API, *SCRIPT_FUNCTIONS}
        self._sources = SourceWriter(f"{self._preamble(every_name)}\n{_OWN_NAMES}\n")
        functions = {
            source: self._sources.write(source, proven=proven) for source, proven in self._source_functions().items()
        }
        self._variables = self._name_tasks()
        self._also_after = also_after(tasks, set(self._variables))
        self._code = TaskCode(self._variables, functions, self._also_after)
        self._suspects: list[str] = []

    def _source_functions(self) -> dict[Source, bool]:
        """The sources of the tasks; True for a source with which a task ended DONE."""
        proven: dict[Source, bool] = {}
        for task in self._tasks:
            function = work.function if isinstance(work := self._representatives[task.uid], ComputeTask) else None
            if isinstance(function, Source):
                done = any(leaf.state is TaskState.DONE for leaf in leaves([task]))
                proven[function] = proven.get(function, False) or done
        return proven

    def _name_tasks(self) -> dict[str, str]:
        """The variable of each task, by uid. The variable of a replaced task ends with a number."""
        used_names = self._sources.names
        variables: dict[str, str] = {}
        earlier: Counter[str] = Counter()
        for task in sorted(self._tasks, key=lambda task: task.replaced_by is not None):
            name = "".join(letter if letter.isalnum() else "_" for letter in name_of(task))
            if task.replaced_by is not None:
                earlier[name] += 1
                name = f"{name}_{earlier[name]}"
            while name in used_names or keyword.iskeyword(name):
                name += "_"
            variables[task.uid] = name
            used_names.add(name)
        return variables

    def write(self) -> Script:
        body = "\n".join(self._body())
        used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} | {
            "asyncio",
            "json",
            "math",
            "as_json",
        }
        if any(map(self._looks_secret, self._sources.definitions)):
            self._suspects.append("the functions")
        parts = [self._preamble(used), *self._sources.definitions, body, _MAIN]
        text = f"{self._docstring()}\n\n" + "\n\n\n".join(parts)
        return Script(text, len(self._tasks), self._left_out, self._replaced, len(self._unwritable), self._secrets)

    @property
    def _secrets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._code.looked_up))

    # --- docstring and imports

    def _docstring(self) -> str:
        first = (
            f"Repeats session {self._id} of rhapsody-mcp {__version__}, {tasks_text(len(self._tasks))}; prints JSON."
        )
        return "\n".join([f'"""{first}', "", *(f"- {sentence}." for sentence in self._notes()), '"""'])

    def _notes(self) -> Iterator[str]:
        """Sentences on how to run the script, and on how far its results repeat."""
        yield f"Run it with a Python that has rhapsody-mcp, such as {sys.executable}"
        yield "Functions and programs repeat, unless they read a clock, chance, the network or files that change"
        if (count := max(plan.arguments.get("num_nodes", 1) for plan in self._plans)) > 1:
            where = "here they run on this machine or, inside a job of Slurm, on its nodes"
            yield f"The tasks ran on {self._nodes_text(count)}; {where}"
        if any(isinstance(work, AITask) for work in self._representatives.values()):
            yield "A model repeats its answers at temperature 0, with the same weights, versions and kind of device"
        if random := [work for work in self._representatives.values() if has_random_answers(work)]:
            yield f"{tasks_text(len(random))} drew answers by chance and without a seed: those will differ"
        if still_open := [task for task in self._tasks if not task.state.final]:
            yield f"{tasks_text(len(still_open))} had not ended when this was written"
        if canceled := [task for task in leaves(self._tasks) if task.cause is Cause.CANCELED]:
            yield f"{tasks_text(len(canceled))} of a for_each had been canceled on request: here they run"
        if self._left_out:
            yield f"Left out: {self._left_out} that had been canceled on request, or needed such a task"
        if self._replaced:
            yield f"Left out: {self._replaced} that others of the same name replaced"
        if self._unwritable:
            yield f"Left out: {len(self._unwritable)} that cannot be written as code; a comment says why"
        if self._secrets:
            yield f"Left out, by their names: secrets; set in the environment: {', '.join(self._secrets)}"
        yield "Sources, arguments, prompts and other values stand as they were given, and may hold secrets"
        if self._suspects:
            shown = ", ".join(self._suspects[:_MAX_SUSPECTS]) + (", ..." if len(self._suspects) > _MAX_SUSPECTS else "")
            yield f"Look before you pass it on, some look like secrets: {shown}"

    def _nodes_text(self, count: int) -> str:
        """As in "2 nodes (node1, node2)"."""
        names = sorted({node for task in leaves(self._tasks) for node in task.nodes})
        shown = ", ".join(names[:_MAX_NODES]) + (", ..." if len(names) > _MAX_NODES else "")
        return f"{count} nodes{f' ({shown})' if names else ''}"

    def _preamble(self, used: set[str]) -> str:
        """The imports and the functions of the script, as far as the names in `used` need them."""
        functions = [code for name, code in SCRIPT_FUNCTIONS.items() if name in used]
        used = used.union({"Session"}, *(names for name, names in NEEDED_NAMES.items() if name in used))
        standard = [f"import {name}" for name in _IMPORTS[:-1] if name in used]
        others = ["", "import msgspec"] if "msgspec" in used else []
        api = f"from rhapsody_mcp.api import {', '.join(name for name in _API if name in used)}"
        backends = f"from rhapsody_mcp.backends import {', '.join(self._classes)}"
        return "\n\n\n".join(["\n".join([*standard, *others, "", api, backends]), *functions])

    # --- body

    def _body(self) -> Iterator[str]:
        yield "async def repeat():"
        if self._folder:
            yield f"    os.chdir({self._folder!r})  # where the session's tasks started"
        software = f", software={write_value(self._software)}" if self._software else ""
        yield f"    async with Session([{', '.join(map(self._backend, self._plans))}]{software}) as session:"
        yield from (f"        # {sentence}" for sentence in self._unwritable.values())
        not_awaited = 0
        for before, tasks in submissions(self._tasks):
            if before:
                sources = "session.tasks" if len(before) == not_awaited else self._write_list(before)
                yield f"        await session.wait_tasks({sources})"
            for task in by_need(tasks, self._also_after):
                yield f"        {self._variables[task.uid]} = {self._task_call(task)}"
            yield f"        await session.submit_tasks({self._write_list(tasks)})"
            not_awaited += len(tasks) - len(before)
        yield "        results = {"
        yield from (f"            {label!r}: {variable}," for label, variable in self._labels())
        yield "        }"
        yield "        await session.wait_tasks(results.values())"
        yield "        return {label: report(task) for label, task in results.items()}"

    def _task_call(self, task: Task) -> str:
        """The code that makes a task. Code that may hold a secret adds the task to the suspects."""
        code = self._code.write(task, self._default_backend(task))
        if self._looks_secret(code):
            self._suspects.append(self._variables[task.uid])
        return code

    def _looks_secret(self, code: str) -> bool:
        for variable in self._secrets:
            code = code.replace(f'os.environ["{variable}"]', HIDDEN)
        joined = _LIST_SEPARATOR.sub(" ", code)  # joins an option and the next argument
        return redacted(joined) != joined

    def _write_list(self, tasks: Sequence[Task]) -> str:
        """A list of the variables, on one line where it fits."""
        names = ", ".join(self._variables[task.uid] for task in tasks)
        if len(names) <= _WIDTH:
            return f"[{names}]"
        lines = wrap(names, _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)
        return "\n".join(["[", *lines, "        ]"])

    def _labels(self) -> Iterator[tuple[str, str]]:
        """The label of each result, and the variable of its task.

        A label is the name of the task where only one task has this name, else the uid. A replaced task has lost its
        name.
        """
        counts = Counter(task.name for task in self._tasks if task.replaced_by is None)
        for task in self._tasks:
            is_unique = task.name and counts[task.name] == 1 and task.replaced_by is None
            yield str(task.name if is_unique else task.uid), self._variables[task.uid]

    def _default_backend(self, task: Task) -> str | None:
        kind = kind_of(representative(task))
        return next((backend.name for backend in self._backends if kind in backend.kinds), None)

    def _backend(self, plan: BackendPlan) -> str:
        arguments = {name: value for name, value in plan.arguments.items() if value is not None}
        if "api_key" in arguments:
            arguments["api_key"] = self._code.look_up("ENDPOINT_API_KEY")
        if "url" in arguments:
            arguments["url"] = without_credentials(arguments["url"])
        for name in arguments.keys() & set(BACKENDS[plan.name].paths):
            arguments[name] = _absolute_path(arguments[name])
        if "num_nodes" in arguments:
            arguments["num_nodes"] = Code(f"min({arguments['num_nodes']}, {_NODES_HERE})")
        if "environment" in arguments:
            arguments["environment"] = self._environment(arguments["environment"])
        written = [f"{name}={write_value(value)}" for name, value in arguments.items()]
        return write_call(BACKENDS[plan.name].class_name, written, 1)

    def _environment(self, environment: dict[str, Any]) -> dict[str, Any]:
        variables = environment.get("variables", {})
        secret = {name: self._code.look_up(name) for name in variables if looks_secret(name)}
        return {**environment, **({"variables": {**variables, **secret}} if variables else {})}


def _absolute_path(file: str) -> str:
    """The absolute path of a file; another text, the name of a model on a hub, unchanged."""
    path = os.path.expanduser(file)
    return os.path.abspath(path) if os.path.exists(path) else file
