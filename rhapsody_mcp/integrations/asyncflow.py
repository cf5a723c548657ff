"""RADICAL AsyncFlow: a backend whose tasks run in a session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import msgspec

from rhapsody_mcp.api import AITask, ComputeTask, Session
from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.tasks.task import COMMON_FIELDS, Task

__all__ = ["AsyncFlowBackend"]

_log = logging.getLogger(__name__)
Description = dict[str, Any]
"""A task as AsyncFlow describes it; what came of the task is added to the same dict."""
Callback = Callable[[Description, str], object]
_FIELDS = COMMON_FIELDS - {"uid", "name", "backend"} | {"stdout", "outputs"}
"""The keys of a task_description that are fields of a ComputeTask; the others are its task_backend_specific_kwargs."""
_OPERATORS = frozenset({"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1", "&>"})
_backends: WeakSet[AsyncFlowBackend] = WeakSet()


class _States:
    """AsyncFlow reads the names of the states from an object."""

    RUNNING, DONE, FAILED, CANCELED = "RUNNING", "DONE", "FAILED", "CANCELED"
    terminal_states = frozenset({DONE, FAILED, CANCELED})


class _Open(msgspec.Struct):
    """A task that has not ended; of a service that is ready, the flow has been told that it is DONE."""

    task: Task
    description: Description
    is_told: bool = False


class AsyncFlowBackend:
    """Runs the tasks of a flow in a session: `await WorkflowEngine.create(AsyncFlowBackend(session))`.

    backend   the backend of the session that runs them; default is, for each task, the session's first that runs such
              tasks
    name      what the decorators of the flow select with their `backend`; default is `backend`, else "rhapsody"

    The flow's `shutdown()` cancels its tasks and leaves the session open, for its report and for further flows; one
    flow at a time. Raises UnknownName, and InvalidRequest for what is no session.
    """

    supports_implicit_data_linking = False
    supports_explicit_data_linking = False

    def __init__(self, session: Session, backend: str | None = None, *, name: str | None = None) -> None:
        if not isinstance(session, Session):
            raise InvalidRequest(
                f"AsyncFlowBackend takes a session, not a {type(session).__name__}: open one with async with "
                "Session([backend]) as session, and give AsyncFlowBackend(session)."
            )
        known = [own.name for own in session.backends]
        if backend is not None and backend not in known:
            raise UnknownName("backend", backend, known)
        self.session = session
        self.name = name or backend or "rhapsody"
        self.is_attached = False
        self.attached_to: list[str] = []
        self._backend = backend
        self._work_dir = self._folder = ""
        self._open: dict[str, _Open] = {}
        self._callback: Callback = _ignore
        _backends.add(self)

    # --- what AsyncFlow calls

    def get_task_states_map(self) -> _States:
        return _States()

    def register_callback(self, func: Callback) -> None:
        """Raises InvalidRequest while tasks of another flow run."""
        if self._open:
            raise InvalidRequest(
                f"the backend {self.name!r} runs tasks of another flow; give each flow an AsyncFlowBackend of its own, "
                "which may be over the same session."
            )
        self._callback, self._folder = func, self._work_dir  # which AsyncFlow has set

    async def submit_tasks(self, tasks: Sequence[Description]) -> None:
        self.session.on_change.add(self._handle_change)
        self.session.on_progress.add(self._handle_progress)
        for description in tasks:
            task: Task | None = None
            try:
                task = self._make_task(description)
                self._open[task.uid] = _Open(task, description)
                await self.session.submit_tasks(task)
            except Exception as error:  # what is raised here ends the whole flow
                self._open.pop(task.uid if task else "", None)
                self._fail(description, error)

    async def cancel_task(self, uid: str) -> bool:
        """Whether such a task had not ended. A flow asks its first backend alone, also for the tasks of the others."""
        for backend in [backend for backend in _backends if backend._callback == self._callback]:
            if tasks := [one.task for one in backend._open.values() if one.description["uid"] == uid]:
                await backend.session.cancel(tasks)
                return True
        return False

    async def shutdown(self) -> None:
        if self._open:
            await self.session.cancel([one.task for one in self._open.values()])
        self.session.on_change.discard(self._handle_change)
        self.session.on_progress.discard(self._handle_progress)

    # --- from the flow to the session

    def _make_task(self, description: Description) -> Task:
        asked = dict(description["task_backend_specific_kwargs"])
        name = f"{description['name']}.{description['uid'].rpartition('.')[2]}"
        common: dict[str, Any] = {"name": name, "uid": None, "backend": asked.pop("backend", self._backend)}
        if description.get("prompt"):
            _refuse_pending(description["prompt"])
            timeout = {key: asked.pop(key) for key in ("timeout",) if key in asked}
            return AITask(description["prompt"], task_backend_specific_kwargs=timeout, **common, **asked)
        common.update({key: asked.pop(key) for key in _FIELDS & asked.keys()})
        if of_process := {key: asked.pop(key) for key in ("cwd", "env") if key in asked}:
            asked["process_template"] = {**asked.get("process_template", {}), **of_process}
        if function := description["function"]:
            args, kwargs = description["args"], description["kwargs"]
            return ComputeTask(function, args=args, kwargs=kwargs, task_backend_specific_kwargs=asked, **common)
        executable, *arguments = _command(description, asked.pop("shell", None))
        return ComputeTask(executable=executable, arguments=arguments, task_backend_specific_kwargs=asked, **common)

    # --- from the session to the flow

    def _handle_change(self, task: Task) -> None:
        if (one := self._open.get(task.uid)) is None:
            return
        if task.state.final:
            del self._open[task.uid]
        if one.is_told:
            return
        if task.state is TaskState.RUNNING:
            self._tell(one.description, task.state)
        elif task.state.final:
            self._end(one.description, task)

    def _handle_progress(self, task: Task) -> None:
        """The first word of a service, such as its address, is its result: it is ready, and goes on."""
        one = self._open.get(task.uid)
        if one is None or one.is_told or not one.description["is_service"] or task.progress is None:
            return
        one.is_told = True
        one.description.update(return_value=task.progress.message, stdout=task.progress.message)
        self._tell(one.description, TaskState.DONE)

    def _end(self, description: Description, task: Task) -> None:
        in_files = description["capture_stdio"] and description.get("executable")
        try:
            stdout = self._write(description, "stdout", task.stdout) if in_files else _result(task)
            stderr = self._write(description, "stderr", task.stderr) if in_files else task.stderr
        except OSError as error:
            self._fail(description, error)
            return
        description.update(return_value=task.return_value, stdout=stdout, stderr=stderr, exit_code=task.exit_code)
        if task.state is TaskState.FAILED:
            self._fail(description, _exception(task))
        else:
            self._tell(description, task.state)

    def _write(self, description: Description, stream: str, text: str | None) -> str:
        path = Path(self._folder, f"{description['uid']}.{stream}")
        path.write_text(text or "", encoding="utf-8", errors="surrogateescape")
        return str(path)

    def _fail(self, description: Description, error: Exception) -> None:
        description["exception"] = error
        self._tell(description, TaskState.FAILED)

    def _tell(self, description: Description, state: TaskState) -> None:
        try:
            self._callback(description, state.value)
        except Exception:  # what is raised here would end the engine of the session
            _log.exception("the flow of %s failed as it was told that %s is %s", self.name, description["uid"], state)
        if state.final:
            _wake(self._callback)


def _wake(callback: Callback) -> None:
    """Have the flow look at once for tasks that have ended, which else it does once a second."""
    event = getattr(getattr(callback, "__self__", None), "_component_change_event", None)
    if isinstance(event, asyncio.Event):
        event.set()


def _ignore(description: Description, state: str) -> None:
    """Stands in the place of a flow."""


def _command(description: Description, in_shell: bool | None) -> list[str]:
    """The words of a program. AsyncFlow has split them as a shell does, which loses what was quoted."""
    words = [description["executable"], *description["arguments"]]
    _refuse_pending(" ".join(words))
    if in_shell:
        return ["sh", "-c", " ".join(words)]
    if in_shell is None and (operators := _OPERATORS.intersection(words)):
        raise InvalidTask(
            f"{min(operators)!r} in {' '.join(words)!r} would be text for the program, as it runs without a shell: "
            "return bash -c '...', or give task_description={'shell': True}; with False it is text.",
            field="shell",
        )
    return words


def _refuse_pending(text: Any) -> None:
    """AsyncFlow asks for a command or a prompt before the tasks in it have ended, and Python writes these so."""
    if "<Future " in str(text):
        raise InvalidTask(
            f"{str(text)[:200]!r} holds a task in place of its result: await the task first, and call with its result, "
            "as in a block."
        )


def _result(task: Task) -> Any:
    """What the flow takes as the result of a program or a prompt."""
    as_text = isinstance(task, ComputeTask) and task.stdout_form != "json" and not task.outputs
    return task.stdout if as_text else task.return_value


def _exception(task: Task) -> Exception:
    """What the function has raised, where that is here and a flow can take it."""
    failure = task.exception
    assert failure is not None, "it is FAILED"
    if not isinstance(task.raised, Exception):
        return failure
    if task.traceback:
        task.raised.add_note(task.traceback)
    return task.raised
