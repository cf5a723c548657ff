"""The tasks that a user holds: thin handles over a spec and an outcome, updated in place."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import msgspec

from rhapsody_mcp.backends.base import Kind
from rhapsody_mcp.model.errors import InvalidTask, RhapsodyError, nearest, refuse_unknown
from rhapsody_mcp.model.outcome import Outcome, RankOutcome, TaskCanceled, TaskFailed
from rhapsody_mcp.model.sampling import SAMPLING, checked, refuse_message, whole
from rhapsody_mcp.model.specs import Call, Command, Completion, Content, Layout, Message, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.timing import Timing
from rhapsody_mcp.model.values import PLAIN, Ref, Value
from rhapsody_mcp.runtime.process_layout import read_layout, read_timeout, refuse_half_characters
from rhapsody_mcp.runtime.serialization import Encoder, Module, Source, are_plain

__all__ = [
    "AITask",
    "ComputeTask",
    "ForEach",
    "OnUpstreamFailure",
    "Part",
    "Rank",
    "Task",
    "Text",
    "is_hidden",
    "kind_of",
    "leaves",
    "name_of",
    "reference",
    "tasks_text",
    "with_children",
]

OnUpstreamFailure = Literal["cancel", "run"]

_ON_UPSTREAM_FAILURE = get_args(OnUpstreamFailure)
_uids = itertools.count(1)


class Part(msgspec.Struct, frozen=True):
    """A part of another task's result: in arguments and prompts it stands for `task`'s value at `path`."""

    task: Task
    path: str = ""


class Text:
    """A text for a language model that holds results: its parts, each a text, a task or a Part, become one text.

    A result is in it as it is where it is a text, and else as JSON.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return f"Text({', '.join(map(repr, self.parts))})"


class Rank(msgspec.Struct, frozen=True):
    """One rank of a job. A negative `exit_code` is the signal that ended it."""

    rank: int
    host: str
    pid: int
    exit_code: int | None
    return_value: Any
    stdout: str
    stderr: str
    error: str


class Task:
    """A unit of work. After submission the session updates it in place.

    Awaiting it gives the task itself once it is DONE, raises TaskFailed once it is FAILED and TaskCanceled once
    it is CANCELED. Cancelling whoever awaits it does not cancel the task.

    backend       a backend's name; default is the session's first that runs such tasks
    after         tasks that must be DONE before this one starts, besides those whose results it uses
    retries       how often it is started again after it FAILED, `retry_delay_s` later, and twice as long each
                  next time up to a minute; what could not start as asked (cause invalid) is not tried again
    on_upstream_failure   "cancel" (default): it is CANCELED where a task that it waits for does not end DONE;
                  "run": it runs nevertheless, with None in the place of a result that is not there

    `attempts` counts how often it was started. `replaced_by` is the uid of a task that took its name after it FAILED or
    was CANCELED. `passed_on` says whether another task uses its result, and
    `position` how many of its session had ended before it.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        name: str | None = None,
        uid: str | None = None,
        after: Sequence[Task] = (),
        retries: int = 0,
        retry_delay_s: float = 1.0,
        on_upstream_failure: OnUpstreamFailure = "cancel",
    ) -> None:
        self.uid = uid or f"task.{next(_uids):06d}"
        self.name = name
        self.backend = backend
        self.after = _tasks_to_follow(after)
        self.retries = whole("retries", retries, least=0)
        self.retry_delay_s = _delay(retry_delay_s)
        if on_upstream_failure not in _ON_UPSTREAM_FAILURE:
            raise InvalidTask(f'on_upstream_failure is {on_upstream_failure!r}; valid: "cancel", "run".')
        self.on_upstream_failure = on_upstream_failure
        self.attempts = 0
        self.state = TaskState.NEW
        self.submitted: float | None = None
        self.started: float | None = None
        self.outcome: Outcome | None = None
        self.return_value: Any = None
        self.stdout: str | None = None
        self.stderr: str | None = None
        self.ranks: Sequence[Rank] = ()
        self.parent: ForEach | None = None
        self.passed_on = False
        self.position: int | None = None
        self._future: asyncio.Future[Self] | None = None
        self._needs: Sequence[Task] | None = None

    kind: str
    # Most tasks never have these, nor most of what an AITask may be given. Python shares the names of up to 30
    # attributes between the objects of a class, as far as they are set when an object is made; one with others takes
    # 1.3 KB more.
    last_failure = ""
    replaced_by: str | None = None
    raised: BaseException | None = None
    """What its function raised, where that could be sent and opened in this process."""

    def sources(self) -> Sequence[Task]:
        """The tasks that must have ended before this one starts: those whose results it needs, and `after`."""
        return [*self.needs(), *self.after] if self.after else self.needs()

    def needs(self) -> Sequence[Task]:
        """The tasks whose results this one uses."""
        return list(self._find_needs()) if self._needs is None else self._needs

    def settle_needs(self, more: Iterable[Task] = ()) -> None:
        """Look for them once and for all: the session, which takes the task now, asks again and again. `more` were met
        where only a pickler looks."""
        self._needs = tuple({task.uid: task for task in (*self._find_needs(), *more)}.values())

    def _find_needs(self) -> Iterable[Task]:
        raise NotImplementedError

    def spec(self, encoder: Encoder) -> TaskSpec:
        """What a backend gets. Raises InvalidTask where a value cannot be sent."""
        raise NotImplementedError

    # --- what came of it

    @property
    def exit_code(self) -> int | None:
        return self.outcome.exit_code if self.outcome else None

    @property
    def exception(self) -> TaskFailed | None:
        """None, or what awaiting the task raises; its text holds the original message."""
        if self.outcome is None or self.outcome.state is TaskState.DONE:
            return None
        kind = TaskCanceled if self.outcome.state is TaskState.CANCELED else TaskFailed
        failure = kind(f"{self.uid}: {self.outcome.error}", self.outcome, self, self.uid)
        failure.__cause__ = self.raised
        return failure

    @property
    def cause(self) -> Cause | None:
        return self.outcome.cause if self.outcome else None

    @property
    def traceback(self) -> str:
        """The traceback where the function raised, as text; else empty."""
        return self.outcome.traceback if self.outcome else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about how it ran, such as "4 ranks share 2 cores"."""
        return self.outcome.notes if self.outcome else ()

    @property
    def timing(self) -> Timing:
        if self.outcome is None:
            return Timing()
        return Timing.of(self.submitted, self.outcome.started, self.outcome.ended)

    # --- awaiting

    def __await__(self) -> Generator[Any, None, Self]:
        return asyncio.shield(self.future).__await__()

    @property
    def future(self) -> asyncio.Future[Self]:
        """Ends with the task. Raises RhapsodyError before submission."""
        if self._future is None:
            if self.state is TaskState.NEW:
                raise RhapsodyError(f"{self.uid} is not submitted yet: call session.submit_tasks([task]) first.")
            self._future = asyncio.get_running_loop().create_future()
            self.settle()
        return self._future

    def settle(self: Self) -> None:
        """End the future, if anybody has asked for it, once the task has ended."""
        if self._future is None or self._future.done() or not self.state.final:
            return
        if (error := self.exception) is None:
            self._future.set_result(self)
        else:
            self._future.set_exception(error)
            self._future.exception()  # a failure that nobody awaits is no news: it stands in the task

    # --- the dict face

    def keys(self) -> list[str]:
        """The names of all that can be read of it, by `task[name]` as by `task.name`."""
        return list(dict.fromkeys([*(name for name in vars(self) if not name.startswith("_")), *self._more_fields]))

    def get(self, field: str, default: Any = None) -> Any:
        return getattr(self, field) if field in self else default

    def __getitem__(self, field: str) -> Any:
        if field not in self:
            raise KeyError(f"{field}{nearest(str(field), self.keys())}")
        return getattr(self, field)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, field: object) -> bool:
        return field in self.keys()

    _more_fields: Sequence[str] = (
        *("exit_code", "exception", "cause", "traceback", "notes", "timing", "last_failure", "replaced_by", "raised"),
    )

    def __getstate__(self) -> dict[str, Any]:
        """Without the future, which belongs to an event loop."""
        return {**vars(self), "_future": None}

    @property
    def what(self) -> str:
        """What it runs, in a few words."""
        return ""

    def __repr__(self) -> str:
        return f"<{' '.join(filter(None, [type(self).__name__, self.uid, self.name, self.what, self.state]))}>"


class ComputeTask(Task):
    """A function or a program to run.

    function      any callable, sync or async; it is run to completion and its value is `return_value`
    args, kwargs  its arguments; a task among them, at any depth, stands for that task's return value; a task as
                  kwargs, for a dict of all of them
    executable    a path, or a name on PATH; `return_value` is its standard output without outer white space, or
                  its bytes where that is not UTF-8 text
    arguments     its arguments; a task among them stands for its return value, as text or as JSON; a Text holds some
    task_backend_specific_kwargs
        process_template   a dict (env, cwd, policy): a process of its own
        process_templates  a list of (ranks, dict): a job of several processes
        type, ranks        "mpi" and a number: a job whose ranks speak MPI; pmi: "auto", "pmix", "cray", "none"
        timeout            seconds, in every mode
    """

    kind = "compute"

    def __init__(
        self,
        function: Callable[..., Any] | Source | Module | None = None,
        *,
        executable: str | os.PathLike[str] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | Task | Part | None = None,
        arguments: Sequence[Any] = (),
        task_backend_specific_kwargs: Mapping[str, Any] | None = None,
        **common: Any,
    ) -> None:
        _refuse_foreign(common)
        refuse_unknown("field of ComputeTask", common.keys() - _COMMON_FIELDS, (*_COMPUTE_FIELDS, *_COMMON_FIELDS))
        super().__init__(**common)
        self.function = function
        self.executable = os.fspath(executable) if isinstance(executable, os.PathLike) else executable
        self.args = tuple(args)
        self.kwargs = kwargs if isinstance(kwargs, Task | Part) else dict(kwargs or {})
        self.arguments = tuple(arguments)
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
        if self.arguments:
            raise InvalidTask("arguments= belongs to an executable; a function takes args= and kwargs=.")
        if callable(self.function):
            return
        if not isinstance(self.function, Source | Module):
            hint = ' A program goes in as executable="...", with arguments=[...].' * isinstance(self.function, str)
            raise InvalidTask(f"function= is a {type(self.function).__name__}, which cannot be called.{hint}")
        if isinstance(self.function, Source) and isinstance(self.kwargs, dict):
            self.function.check_arguments(self.args, self.kwargs)

    def _check_program(self, executable: str) -> None:
        if not executable.strip() or "\0" in executable:
            raise InvalidTask(f"executable is {executable!r}; valid is a path, or a name on PATH.")
        if with_nul := [text for text in self.arguments if isinstance(text, str) and "\0" in text]:
            raise InvalidTask(f"{with_nul[0][:80]!r} among arguments holds a NUL character, which no program can get.")
        if any(isinstance(item, bytes | bytearray) for item in self.arguments):
            raise InvalidTask("arguments holds bytes; valid is text, which a program gets as UTF-8, or a task.")
        if any(any(_tasks_in(item)) for item in self.arguments if not isinstance(item, Task | Part | Text)):
            raise InvalidTask("arguments holds a task inside a list or a dict; a task is an argument of its own.")
        for field, text in (("executable", executable), *(("arguments", item) for item in self.arguments)):
            if isinstance(text, str):
                refuse_half_characters(field, text)
        if self.args or self.kwargs:
            raise InvalidTask("args= and kwargs= belong to a function; an executable takes arguments=[...].")

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
        return itertools.chain.from_iterable(map(_tasks_in, (self.args, self.kwargs, self.arguments)))

    def spec(self, encoder: Encoder) -> TaskSpec:
        work: Call | Command
        if self.function is not None:
            work = encoder.call(self.function, self.args, self.kwargs)
        else:
            work = Command(self.executable or "", tuple(map(_content, self.arguments)))
        return TaskSpec(uid=self.uid, work=work, layout=self.layout, timeout_s=self._timeout_s)


class AITask(Task):
    """A prompt, a list of prompts, or the messages of a conversation, for a language model.

    prompt          a text or a list of texts; a task stands for its return value, and a Text holds some
    messages        instead of prompt: dicts with role ("system", "user" or "assistant") and content, a text like
                    prompt; a task stands for one or a list of them
    model           a name that the backend serves; default is the backend's own
    system_prompt   instructions that come before the prompt
    temperature     0.0 to 2.0        top_p   0.0 to 1.0        top_k   a positive number, or -1 for all
    max_tokens      the most tokens to generate for one prompt
    seed            a whole number: the same seed, prompt and server give the same answer
    n               how many answers each prompt gets, up to 128, as a list
    logprobs        with each token its log probability, and those of so many of the likeliest, up to 20
    stop_sequences  texts that end the answer and are not part of it
    json_schema     a JSON schema of an object, which the answer is held to
    task_backend_specific_kwargs   timeout in seconds

    From temperature to json_schema, and for model, a task or a Part stands for a value that is there, and looked at,
    when this one starts.

    `return_value` and `response` are the answer: a text for one prompt, a list in order for a list. With n an answer is
    the list of them. With json_schema it is the object itself, as a dict; the task is FAILED where one was
    cut or does not fit. With logprobs it is `{"text": ..., "logprobs": [{"token": ..., "logprob": ...,
    "top_logprobs": [{"token": ..., "logprob": ...}, ...]}, ...]}`.
    """

    kind = "ai"

    def __init__(
        self,
        prompt: Any = None,
        *,
        messages: Sequence[Mapping[str, Any] | Task | Part] | Task | Part | None = None,
        model: str | Task | Part | None = None,
        system_prompt: str | Task | Part | Text | None = None,
        temperature: float | Task | Part | None = None,
        max_tokens: int | Task | Part | None = None,
        top_p: float | Task | Part | None = None,
        top_k: int | Task | Part | None = None,
        seed: int | Task | Part | None = None,
        n: int | Task | Part | None = None,
        logprobs: int | Task | Part | None = None,
        stop_sequences: Sequence[str] | Task | Part | None = None,
        json_schema: dict[str, Any] | Task | Part | None = None,
        task_backend_specific_kwargs: Mapping[str, Any] | None = None,
        **common: Any,
    ) -> None:
        refuse_unknown("field of AITask", common.keys() - _COMMON_FIELDS, (*_AI_FIELDS, *_COMMON_FIELDS))
        super().__init__(**common)
        self.prompt = prompt
        self.model = model
        messages = [messages] if isinstance(messages, Task | Part) else messages
        asked: dict[str, Any] = {"messages": messages, "system_prompt": system_prompt, "temperature": temperature}
        asked |= {"max_tokens": max_tokens, "top_p": top_p, "top_k": top_k, "seed": seed, "n": n, "logprobs": logprobs}
        asked |= {"stop_sequences": stop_sequences, "json_schema": json_schema}
        for field, value in asked.items():
            if value is not None:
                setattr(self, field, value)
        self.task_backend_specific_kwargs = dict(task_backend_specific_kwargs or {})
        refuse_unknown(
            "key of an AITask's task_backend_specific_kwargs", self.task_backend_specific_kwargs, ["timeout"]
        )
        self._timeout_s = read_timeout(self.task_backend_specific_kwargs)
        if logprobs is not None and json_schema is not None:
            raise InvalidTask("logprobs and json_schema contradict each other; give one of them.")
        self._refuse_wrong_texts()
        self._checked = {
            field: checked(field, value) for field, value in self._sampling() if not isinstance(value, Task | Part)
        }

    messages: Sequence[Mapping[str, Any] | Task | Part] | None = None
    system_prompt: str | Task | Part | Text | None = None
    temperature: float | Task | Part | None = None
    max_tokens: int | Task | Part | None = None
    top_p: float | Task | Part | None = None
    top_k: int | Task | Part | None = None
    seed: int | Task | Part | None = None
    n: int | Task | Part | None = None
    logprobs: int | Task | Part | None = None
    stop_sequences: Sequence[str] | Task | Part | None = None
    json_schema: dict[str, Any] | Task | Part | None = None

    def _sampling(self) -> Iterator[tuple[str, Any]]:
        """What is given of it."""
        return ((field, value) for field in SAMPLING if (value := getattr(self, field)) is not None)

    def _refuse_wrong_texts(self) -> None:
        if self.messages is not None:
            for field in ("prompt", "system_prompt"):
                if getattr(self, field) is not None:
                    raise InvalidTask(f"messages and {field} contradict each other; write it as one of the messages.")
            _refuse_messages(self.messages)
            return
        if not self._prompts:
            raise InvalidTask("prompt is an empty list; give a text or at least one text.")
        for prompt in self._prompts:
            if isinstance(prompt, dict) and "role" in prompt:
                raise InvalidTask("prompt holds a message with a role; give the messages of a chat as messages.")
            _refuse_content("prompt", prompt)
        if self.system_prompt is not None:
            _refuse_content("system_prompt", self.system_prompt)

    @property
    def _prompts(self) -> Sequence[Any]:
        return self.prompt if isinstance(self.prompt, list | tuple) else [self.prompt]

    _more_fields = (*Task._more_fields, "response", "messages", "system_prompt", *SAMPLING)

    @property
    def response(self) -> Any:
        return self.return_value

    @property
    def what(self) -> str:
        return self.model if isinstance(self.model, str) else ""

    @property
    def many(self) -> bool:
        return isinstance(self.prompt, list | tuple)

    def _find_needs(self) -> Iterable[Task]:
        return _tasks_in([self.prompt, self.messages, self.system_prompt, *(value for _, value in self._sampling())])

    def spec(self, encoder: Encoder) -> TaskSpec:
        referring: dict[str, Any] = {
            field: ref for field, value in self._sampling() if (ref := reference(value)) is not None
        }
        work = Completion(
            prompts=() if self.messages else tuple(map(_content, self._prompts)),
            messages=tuple(map(_message, self.messages or ())),
            many=self.many,
            system_prompt=None if self.system_prompt is None else _content(self.system_prompt),
            **self._checked,
            **referring,
        )
        return TaskSpec(uid=self.uid, work=work, layout=Layout("native"), timeout_s=self._timeout_s)


_PLACES = {
    "cwd": 'task_backend_specific_kwargs={"process_template": {"cwd": ...}}',
    "env": 'task_backend_specific_kwargs={"process_template": {"env": {...}}}',
    "timeout": 'task_backend_specific_kwargs={"timeout": seconds}',
    "ranks": 'task_backend_specific_kwargs={"process_templates": [(ranks, {})]}',
    "shell": 'executable="sh", arguments=["-c", "..."]',
    "capture_stdio": "task.stdout and task.stderr, which are always kept",
}
"""What other libraries call it, and where it is here."""


def _refuse_foreign(fields: Iterable[str]) -> None:
    for field in fields:
        if field in _PLACES:
            raise InvalidTask(f"ComputeTask has no field {field!r}; write it as {_PLACES[field]}.")


_COMMON_FIELDS = {"backend", "name", "uid", "after", "retries", "retry_delay_s", "on_upstream_failure"}
_COMPUTE_FIELDS = ("function", "executable", "args", "kwargs", "arguments", "task_backend_specific_kwargs")
_AI_FIELDS = ("prompt", "messages", "system_prompt", *SAMPLING, "task_backend_specific_kwargs")


def reference(item: object) -> Ref | None:
    """The Ref that a task, or a part of one, stands for inside arguments and prompts; None for all else."""
    if isinstance(item, Task):
        return Ref(item.uid)
    return Ref(item.task.uid, item.path) if isinstance(item, Part) else None


def _content(text: Any) -> Content:
    """A text for a model, as a backend gets it."""
    return tuple(map(_argument, text.parts)) if isinstance(text, Text) else _argument(text)


def _message(message: Any) -> Message | Ref:
    return reference(message) or Message(message["role"], _content(message["content"]))


def _refuse_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidTask(f'messages is {messages!r}; valid is a list such as [{{"role": "user", "content": "..."}}].')
    for message in messages:
        if not isinstance(message, Task | Part):
            refuse_message(message)
            _refuse_content("content", message["content"])


def _refuse_content(field: str, text: object) -> None:
    parts = text.parts if isinstance(text, Text) else (text,)
    for part in parts:
        if not isinstance(part, str | Task | Part):
            valid = f"a text, or a task that stands for its result{_OR_LIST.get(field, '')}"
            raise InvalidTask(f"{field} is a {type(part).__name__}; valid is {valid}. Texts alone are taken.")
    if all(isinstance(part, str) and not part.strip() for part in parts):
        raise InvalidTask(f"{_EMPTY.get(field, field)} is empty; write what the model shall read.")


_OR_LIST = {"prompt": ", or a list of these"}
_EMPTY = {"prompt": "a prompt", "content": "the content of a message"}


def _argument(item: object) -> str | Ref:
    return reference(item) or str(item)


def _tasks_in(value: object) -> Iterator[Task]:
    """Every task in lists, tuples, sets and dicts, at any depth."""
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if type(item) in PLAIN:
            continue
        if isinstance(item, Part):
            yield item.task
        elif isinstance(item, Task):
            yield item
        elif isinstance(item, Text):
            pending.extend(item.parts)
        elif isinstance(item, _CONTAINERS) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)


_CONTAINERS = (list, tuple, set, frozenset, dict)


class ForEach(Task):
    """The same task once for each item, side by side; its result is the list of their results, in order.

    items         a list, or a task (or Part of one) whose result is a list
    make          makes the task for one item: called with the item and its number. Of a result that is no JSON the
                  item is a Part, which stands for it in arguments
    uses          tasks whose results the made ones use, besides `items`: these must have ended first

    `children` are the made tasks, named as in `sweep[0]`; those of a list are made at once. It is DONE when all of
    them are, else FAILED (or CANCELED, where none of them FAILED) with None in the place of what is not there.
    """

    kind = "for_each"

    def __init__(
        self,
        items: Sequence[Any] | Task | Part,
        make: Callable[[Any, int], ComputeTask | AITask],
        *,
        uses: Sequence[Task] = (),
        **common: Any,
    ) -> None:
        refuse_unknown("field of ForEach", common.keys() - _COMMON_FIELDS, ("items", "make", "uses", *_COMMON_FIELDS))
        super().__init__(**common)
        if not isinstance(items, Task | Part | list | tuple):
            raise InvalidTask(f"items is a list, or a task whose result is one, not a {type(items).__name__}.")
        self.items, self.make = items, make
        self.children: list[ComputeTask | AITask] = []
        if isinstance(items, list | tuple):
            self.make_children(items)
            uses = [*uses, *{source.uid: source for child in self.children for source in child.needs()}.values()]
        self._uses = list(uses)

    @property
    def source(self) -> Part | None:
        """What the items are a part of; None where they are a list."""
        return (
            Part(self.items) if isinstance(self.items, Task) else self.items if isinstance(self.items, Part) else None
        )

    def make_children(self, items: Sequence[Any]) -> None:
        """Raises InvalidTask, which names the item, where `make` refuses one."""
        self.children = [self._child(item, number) for number, item in enumerate(items)]

    def _child(self, item: Any, number: int) -> ComputeTask | AITask:
        try:
            child = self.make(item, number)
        except InvalidTask as error:
            raise InvalidTask(f"item {number}: {error}") from error
        child.uid, child.name = f"{self.uid}[{number}]", f"{name_of(self)}[{number}]"
        child.backend = child.backend or self.backend
        child.after, child.on_upstream_failure = self.after, self.on_upstream_failure
        child.retries, child.retry_delay_s = self.retries, self.retry_delay_s
        child.parent = self
        return child

    def _find_needs(self) -> Iterable[Task]:
        return [*_tasks_in([self.items]), *self._uses]

    def spec(self, encoder: Encoder) -> TaskSpec:
        raise NotImplementedError("its children are what backends get")


def name_of(task: Task) -> str:
    """What a person calls it: its name, or its uid where it has none."""
    return task.name or task.uid


def kind_of(task: Task) -> Kind | Literal["for_each"]:
    """What a backend must be able to run for this task; a ForEach is run by the session."""
    if isinstance(task, ForEach):
        return "for_each"
    if isinstance(task, AITask):
        return "prompt"
    return "function" if isinstance(task, ComputeTask) and task.function is not None else "executable"


def is_hidden(task: Task) -> bool:
    """Whether it is this program's own, which no list or count shows."""
    return task.uid.startswith("~")


def tasks_text(count: int) -> str:
    """As in `1 task` and `3 tasks`."""
    return "1 task" if count == 1 else f"{count} tasks"


def leaves(tasks: Iterable[Task]) -> list[Task]:
    """These tasks, with the children of a ForEach in its place where it has any."""
    found: list[Task] = []
    for task in tasks:
        found += task.children if isinstance(task, ForEach) and task.children else [task]
    return found


def with_children(tasks: Iterable[Task]) -> Iterator[Task]:
    """Each task, a ForEach after its children."""
    for task in tasks:
        if isinstance(task, ForEach):
            yield from task.children
        yield task


def _tasks_to_follow(after: object) -> tuple[Task, ...]:
    if isinstance(after, Task) or not isinstance(after, Iterable) or not all(isinstance(task, Task) for task in after):
        raise InvalidTask("after is a list of tasks, as in [first, second].")
    return tuple(after)


def _delay(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
        raise InvalidTask(f"retry_delay_s is {seconds!r}; valid is a number of seconds from 0 to 3600.")
    return float(seconds)


def rank_of(outcome: RankOutcome, read: Callable[[Value], Any]) -> Rank:
    """A rank as users see it."""
    return Rank(
        outcome.rank,
        outcome.host,
        outcome.pid,
        outcome.exit_code,
        None if outcome.value is None else read(outcome.value),
        outcome.stdout.read(),
        outcome.stderr.read(),
        outcome.error,
    )
