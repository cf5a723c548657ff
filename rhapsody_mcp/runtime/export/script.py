"""Writes a Python script that repeats the tasks of a session."""

from __future__ import annotations

import ast
import keyword
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from textwrap import wrap
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from rhapsody_mcp import __version__
from rhapsody_mcp.backends import BACKENDS
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.backend_factory import Plan
from rhapsody_mcp.runtime.export.function_source import Sources
from rhapsody_mcp.runtime.export.literals import write_call, write_value
from rhapsody_mcp.runtime.export.task_code import TaskCode, looks_secret, whole, work_of
from rhapsody_mcp.runtime.redaction import HIDDEN, redacted
from rhapsody_mcp.runtime.serialization import Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, ForEach, Task, kind_of, leaves, name_of, tasks_text

__all__ = ["Script", "draws_by_chance", "plain_url", "write_script"]

_IMPORTS = ("asyncio", "json", "math", "os", "msgspec")
_API = ("AITask", "ComputeTask", "ForEach", "Module", "Part", "Session", "Source", "Text")
_REPORT = '''\
def report(task):
    """What came of a task, as plain data."""
    if task.state == "DONE":
        try:
            return {"state": "DONE", "result": as_json(task.return_value)}
        except Exception as error:  # a __repr__ may raise anything, and a list may hold itself
            kind = type(task.return_value).__name__
            return {"state": "DONE", "result": f"{kind}, which cannot be shown: {type(error).__name__}"}
    return {"state": str(task.state), "error": str(task.exception)}'''
_AS_JSON = '''\
def as_json(value):
    """What JSON can say of it: keys as text, NaN as "NaN", an array of up to 1000 elements as lists."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(part) for part in value]
    if isinstance(value, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(float(value)), float(value))
    if value is None or isinstance(value, int | str):
        return value
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "tolist"):
        return repr(value)
    if math.prod(shape) <= 1000:
        return as_json(value.tolist())
    return f"{type(value).__name__} of shape {tuple(shape)}, dtype {getattr(value, 'dtype', '?')}"'''
_TEXT = '''\
def text(item):
    """An item in a text: a text as it is, anything else as JSON."""
    return item if isinstance(item, str | Part) else msgspec.json.encode(item).decode()'''
_PART = '''\
def part(item, path):
    """What a path leads to in an item."""
    if isinstance(item, Part):
        return Part(item.task, item.path + path)
    for step in path.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        item = item[int(step)] if isinstance(item, list) else item[step]
    return item'''
_END = """\
if __name__ == "__main__":
    print(json.dumps(asyncio.run(repeat()), indent=1))
"""
_WIDTH, _SUSPECTS = 80, 10
_BETWEEN = re.compile(r"[\"'],\s*[\"']")
_OWN_NAMES = "repeat = session = results = item = task = label = _ = None"


class Script(msgspec.Struct, frozen=True):
    """`left_out` counts the tasks that are not in it because they were canceled, `replaced` those that others of the
    same name replaced, and `unwritable` those that no code can say. `secrets` are the environment variables that it
    needs."""

    text: str
    tasks: int
    left_out: int
    replaced: int
    unwritable: int
    secrets: tuple[str, ...]


def write_script(
    id: str, tasks: Sequence[Task], backends: Sequence[Backend], plans: Sequence[Plan], folder: str = ""
) -> Script:
    """A script that runs these tasks on backends that are made as planned, in `folder`, and prints what came of each as
    JSON.

    It submits them in the same order, and waits where the session had waited: a task may build on files of those
    that had ended when it was submitted. What was canceled on request is left out, and what needs that; what came
    after it comes after what it had to wait for. What a failure before it had canceled is in it. What cannot be written
    as code is left out, and what another task of the same name replaced, unless a task that is in the script uses it.
    """
    return _Writer(id, tasks, backends, plans, folder).write()


def draws_by_chance(task: Task) -> bool:
    """Whether a model's answers to it may differ from run to run."""
    return isinstance(task, AITask) and task.temperature != 0 and task.seed is None


def plain_url(url: str) -> str:
    """Without a user name and a password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class _Writer:
    def __init__(
        self, id: str, tasks: Sequence[Task], backends: Sequence[Backend], plans: Sequence[Plan], folder: str
    ) -> None:
        self._id, self._backends, self._plans, self._folder = id, backends, plans, folder
        repeatable = _repeatable(tasks)
        kept = {task.uid for task in repeatable}
        self._replaced = sum(task.replaced_by is not None for task in tasks if task.uid not in kept)
        self._left_out = len(tasks) - len(repeatable) - self._replaced
        self._unwritable = _unwritable(repeatable)
        self._tasks = [task for task in repeatable if task.uid not in self._unwritable]
        self._works = {task.uid: work_of(task) for task in self._tasks}
        self._classes = sorted({BACKENDS[plan.name].class_name for plan in plans})
        every_name = {*_IMPORTS, *_API, "text", "part", "report", "as_json"}
        self._sources = Sources(f"{self._beginning(every_name)}\n{_OWN_NAMES}\n")
        functions = {source: self._sources.write(source, tried=tried) for source, tried in self._every_source().items()}
        self._variables = self._name_tasks()
        self._also_after = _also_after(tasks, set(self._variables))
        self._code = TaskCode(self._variables, functions, self._also_after)
        self._suspects: list[str] = []

    def _every_source(self) -> dict[Source, bool]:
        """Each source, with whether a task has run it to its end."""
        tried: dict[Source, bool] = {}
        for task in self._tasks:
            function = work.function if isinstance(work := self._works[task.uid], ComputeTask) else None
            if isinstance(function, Source):
                done = any(one.state is TaskState.DONE for one in leaves([task]))
                tried[function] = tried.get(function, False) or done
        return tried

    def _name_tasks(self) -> dict[str, str]:
        """A variable for each task, by its uid; one that was replaced has a number behind its name."""
        taken = self._sources.names
        variables: dict[str, str] = {}
        earlier: Counter[str] = Counter()
        for task in sorted(self._tasks, key=lambda task: task.replaced_by is not None):
            name = "".join(letter if letter.isalnum() else "_" for letter in name_of(task))
            if task.replaced_by is not None:
                earlier[name] += 1
                name = f"{name}_{earlier[name]}"
            while name in taken or keyword.iskeyword(name):
                name += "_"
            variables[task.uid] = name
            taken.add(name)
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
        parts = [self._beginning(used), *self._sources.definitions, body, _END]
        text = f"{self._head()}\n\n" + "\n\n\n".join(parts)
        return Script(text, len(self._tasks), self._left_out, self._replaced, len(self._unwritable), self._secrets)

    @property
    def _secrets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._code.looked_up))

    # --- what comes first

    def _head(self) -> str:
        first = (
            f"Repeats session {self._id} of rhapsody-mcp {__version__}, {tasks_text(len(self._tasks))}; prints JSON."
        )
        return "\n".join([f'"""{first}', "", *(f"- {sentence}." for sentence in self._limits()), '"""'])

    def _limits(self) -> Iterator[str]:
        """How to run it, and how far the same comes out again."""
        yield f"Run it with a Python that has rhapsody-mcp, such as {sys.executable}"
        yield "Functions and programs repeat, unless they read a clock, chance, the network or files that change"
        if any(isinstance(work, AITask) for work in self._works.values()):
            yield "A model repeats its answers at temperature 0, with the same weights, versions and kind of device"
        if chance := [work for work in self._works.values() if draws_by_chance(work)]:
            yield f"{tasks_text(len(chance))} drew answers by chance and without a seed: those will differ"
        if still_open := [task for task in self._tasks if not task.state.final]:
            yield f"{tasks_text(len(still_open))} had not ended when this was written"
        if again := [one for one in leaves(self._tasks) if one.cause is Cause.CANCELED]:
            yield f"{tasks_text(len(again))} of a for_each had been canceled on request: here they run"
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
            shown = ", ".join(self._suspects[:_SUSPECTS]) + (", ..." if len(self._suspects) > _SUSPECTS else "")
            yield f"Look before you pass it on, some look like secrets: {shown}"

    def _beginning(self, used: set[str]) -> str:
        """Imports, and the functions of the script's own, as far as they are used."""
        helpers = {"report": _REPORT, "text": _TEXT, "part": _PART, "as_json": _AS_JSON}
        chosen = [code for name, code in helpers.items() if name in used]
        needs = {"text": {"Part", "msgspec"}, "part": {"Part"}}
        used = used.union({"Session"}, *(names for helper, names in needs.items() if helper in used))
        standard = [f"import {name}" for name in _IMPORTS[:-1] if name in used]
        others = ["", "import msgspec"] if "msgspec" in used else []
        api = f"from rhapsody_mcp.api import {', '.join(name for name in _API if name in used)}"
        backends = f"from rhapsody_mcp.backends import {', '.join(self._classes)}"
        return "\n\n\n".join(["\n".join([*standard, *others, "", api, backends]), *chosen])

    # --- what is run

    def _body(self) -> Iterator[str]:
        yield "async def repeat():"
        if self._folder:
            yield f"    os.chdir({self._folder!r})  # where the session's tasks started"
        yield f"    async with Session([{', '.join(map(self._backend, self._plans))}]) as session:"
        yield from (f"        # {told}" for told in self._unwritable.values())
        not_awaited = 0
        for before, tasks in _submissions(self._tasks):
            if before:
                waited = "session.tasks" if len(before) == not_awaited else self._listed(before)
                yield f"        await session.wait_tasks({waited})"
            for task in _by_need(tasks, self._also_after):
                yield f"        {self._variables[task.uid]} = {self._looked_at(task)}"
            yield f"        await session.submit_tasks({self._listed(tasks)})"
            not_awaited += len(tasks) - len(before)
        yield "        results = {"
        yield from (f"            {label!r}: {variable}," for label, variable in self._labels())
        yield "        }"
        yield "        await session.wait_tasks(results.values())"
        yield "        return {label: report(task) for label, task in results.items()}"

    def _looked_at(self, task: Task) -> str:
        """Its code; a task with what looks like a secret is noted."""
        code = self._code.write(task, self._default_backend(task))
        if self._looks_secret(code):
            self._suspects.append(self._variables[task.uid])
        return code

    def _looks_secret(self, code: str) -> bool:
        for variable in self._secrets:
            code = code.replace(f'os.environ["{variable}"]', HIDDEN)
        in_a_row = _BETWEEN.sub(" ", code)  # an option, and what follows it
        return redacted(in_a_row) != in_a_row

    def _listed(self, tasks: Sequence[Task]) -> str:
        """On one line where they are few."""
        listed = ", ".join(self._variables[task.uid] for task in tasks)
        if len(listed) <= _WIDTH:
            return f"[{listed}]"
        lines = wrap(listed, _WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)
        return "\n".join(["[", *lines, "        ]"])

    def _labels(self) -> Iterator[tuple[str, str]]:
        """A task's name where it alone has it, else its id; and its variable. What was replaced lost its name."""
        counts = Counter(task.name for task in self._tasks if task.replaced_by is None)
        for task in self._tasks:
            named = task.name and counts[task.name] == 1 and task.replaced_by is None
            yield str(task.name if named else task.uid), self._variables[task.uid]

    def _default_backend(self, task: Task) -> str | None:
        kind = kind_of(task)
        return next((backend.name for backend in self._backends if kind in backend.kinds), None)

    def _backend(self, plan: Plan) -> str:
        given = {name: value for name, value in plan.arguments.items() if value is not None}
        if "api_key" in given:
            given["api_key"] = self._code.look_up("ENDPOINT_API_KEY")
        if "url" in given:
            given["url"] = plain_url(given["url"])
        for name in given.keys() & set(BACKENDS[plan.name].paths):
            given[name] = _wherever_it_runs(given[name])
        if "environment" in given:
            given["environment"] = self._environment(given["environment"])
        return write_call(
            BACKENDS[plan.name].class_name, [f"{name}={write_value(value)}" for name, value in given.items()], 1
        )

    def _environment(self, given: dict[str, Any]) -> dict[str, Any]:
        variables = given.get("variables", {})
        secret = {name: self._code.look_up(name) for name in variables if looks_secret(name)}
        return {**given, **({"variables": {**variables, **secret}} if variables else {})}


def _wherever_it_runs(file: str) -> str:
    """A path from here as one from anywhere; what is no file is a name on a hub."""
    path = os.path.expanduser(file)
    return os.path.abspath(path) if os.path.exists(path) else file


def _repeatable(tasks: Sequence[Task]) -> list[Task]:
    """The tasks without those that were canceled, and without replaced ones that none of the others uses."""
    lost: set[str] = set()
    ordered = list(_by_need(tasks))
    for task in ordered:
        without_items = isinstance(task, ForEach) and task.source is not None and task.source.task.uid in lost
        if without_items or _was_canceled(task, lost):
            lost.add(task.uid)
    used: set[str] = set()
    for task in reversed(ordered):
        if task.replaced_by is not None and task.uid not in used:
            lost.add(task.uid)
        if task.uid not in lost:
            used.update(whole(source).uid for source in task.sources())
    return [task for task in tasks if task.uid not in lost]


def _was_canceled(task: Task, lost: Collection[str]) -> bool:
    """On request, or because of tasks that are not there again. Some of a for_each may have ended before that."""
    if isinstance(task, ForEach) and any(child.state is TaskState.DONE for child in task.children):
        return False
    if task.cause is not Cause.UPSTREAM:
        return task.cause is Cause.CANCELED
    sources = [whole(source) for source in task.sources()]
    return any(one.uid in lost or (one.replaced_by and one.state is not TaskState.DONE) for one in sources)


def _also_after(tasks: Sequence[Task], kept: Collection[str]) -> dict[str, list[Task]]:
    """By the uid of a task: those that it comes after because of what came in between and is not kept."""
    behind: dict[str, list[Task]] = {}
    for task in _by_need(tasks):
        gone = [source for source in map(whole, task.sources()) if source.uid not in kept]
        before = {one.uid: one for source in gone for one in behind.get(source.uid, ())}
        if task.uid not in kept:
            before |= {source.uid: source for source in map(whole, task.sources()) if source.uid in kept}
        behind[task.uid] = list(before.values())
    return {uid: before for uid, before in behind.items() if uid in kept and before}


def _unwritable(tasks: Sequence[Task]) -> dict[str, str]:
    """What cannot be written as code, and what needs such, by uid: with a sentence that says why."""
    code = TaskCode({task.uid: "task" for task in tasks}, defaultdict(lambda: "function"))
    told: dict[str, str] = {}
    for task in _by_need(tasks):
        name = name_of(task)
        if lacking := [name_of(source) for source in map(whole, task.sources()) if source.uid in told]:
            told[task.uid] = _one_line(f"{name} is left out: it needs {lacking[0]}")
            continue
        try:
            code.write(task, None)
        except Exception as error:  # one task must not take the script from the others
            told[task.uid] = _one_line(f"{name} is left out, it cannot be written as code: {error}")
    return told


def _submissions(tasks: Sequence[Task]) -> Iterator[tuple[list[Task], list[Task]]]:
    """The tasks in order, in lots; each with those of earlier lots that had ended when it was submitted."""
    lot: list[Task] = []
    before: list[Task] = []
    ends: list[tuple[float, int]] = []
    for number, task in enumerate(tasks):
        ended = []
        while ends and task.submitted is not None and ends[0][0] <= task.submitted:
            ended.append(heappop(ends)[1])
        if ended:
            yield before, lot
            before, lot = [tasks[index] for index in sorted(ended)], []
        lot.append(task)
        if task.outcome is not None:
            heappush(ends, (task.outcome.ended, number))
    if lot:
        yield before, lot


def _by_need(tasks: Sequence[Task], also_after: Mapping[str, Sequence[Task]] = MappingProxyType({})) -> Iterator[Task]:
    """The tasks, each after those of them that it waits for, else in their order."""
    index = {task.uid: number for number, task in enumerate(tasks)}
    needs = [[*map(whole, task.sources()), *also_after.get(task.uid, ())] for task in tasks]
    missing = [{index[source.uid] for source in sources if source.uid in index} for sources in needs]
    needed_by: dict[int, list[int]] = {}
    for number, sources in enumerate(missing):
        for source in sources:
            needed_by.setdefault(source, []).append(number)
    ready = [number for number, sources in enumerate(missing) if not sources]
    heapify(ready)
    while ready:
        done = heappop(ready)
        yield tasks[done]
        for number in needed_by.get(done, ()):
            missing[number].discard(done)
            if not missing[number]:
                heappush(ready, number)


def _one_line(text: str) -> str:
    return " ".join(text.split())
