"""Turns prompt tasks into chat requests, and the answers into outcomes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import Ended, Report, Returned, Running
from rhapsody_mcp.backends.inference.answer_checks import AnswerChecker
from rhapsody_mcp.backends.inference.batching import Limits, Prompt, PromptBatcher
from rhapsody_mcp.backends.inference.openai_client import (
    Answer,
    ChatServer,
    Conversation,
    RequestRefused,
    ServerLost,
    WrittenText,
)
from rhapsody_mcp.engine.task.function_call import encode
from rhapsody_mcp.model.errors import InvalidTask, UnknownName
from rhapsody_mcp.model.json_pointer import resolve_pointer
from rhapsody_mcp.model.json_schemas import SchemaMismatch
from rhapsody_mcp.model.outcome import Outcome, Usage, why_stopped
from rhapsody_mcp.model.sampling import SAMPLING, check_message, check_parameter
from rhapsody_mcp.model.specs import Completion, Content, Message, TaskRun, TaskSpec, parts_of
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import INLINE_BYTES, NOTHING, Reader, Ref, Value

__all__ = ["Defaults", "PromptRunner", "check_prompts"]

_MIN_TOP_P = 1e-6
"""Sent in place of a top_p of 0, which vLLM refuses. It leaves only the likeliest token."""
_TRANSIENT_STATUSES = (408, 425, 429)
_MANY_PARTS = 1000
_TOKEN_CHARS = 100
"""The approximate size of a token with its likeliest alternatives, in characters."""
_CUT_ADVICE = "Raise max_tokens, or let json_schema bound what can be long, with maxLength and maxItems."

logger = logging.getLogger(__name__)


class Defaults(msgspec.Struct, frozen=True):
    """Default values for the requests of tasks.

    `parameters` are fields of the server's chat API. `schema_options` are added to the JSON schema of each request, and
    `note` to the notes of each outcome.
    """

    model: str
    parameters: dict[str, Any] = {}
    system_prompt: str | None = None
    schema_options: dict[str, Any] = {}
    note: str = ""


def check_prompts(spec: TaskSpec) -> None:
    """Raise InvalidTask for a task that no server can answer."""
    if not isinstance(spec.work, Completion):
        raise InvalidTask("it is no prompt, and this backend only runs prompts; another backend runs functions.")


class PromptRunner:
    """Runs the prompts of tasks on these servers. Close the runner before the servers."""

    def __init__(self, servers: Iterable[ChatServer], defaults: Defaults, limits: Limits) -> None:
        self._servers = list(servers)
        self._defaults = defaults
        self._batcher = PromptBatcher(self._servers, limits)
        self._checks = AnswerChecker()
        self._tasks: dict[str, asyncio.Task[Outcome | Returned]] = {}
        self._prompt_tasks: dict[str, _PromptTask] = {}

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        for task_run in task_runs:
            prompt_task = _PromptTask(
                task_run, report, read, self._batcher, self._checks, self._defaults, self._servers
            )
            task = asyncio.create_task(prompt_task.run())
            self._tasks[task_run.spec.uid], self._prompt_tasks[task_run.spec.uid] = task, prompt_task
            task.add_done_callback(partial(self._ended, prompt_task, report))

    def _ended(self, prompt_task: _PromptTask, report: Report, task: asyncio.Task[Outcome | Returned]) -> None:
        uid = prompt_task.task_run.spec.uid
        del self._tasks[uid], self._prompt_tasks[uid]
        outcome: Outcome | Returned
        if task.cancelled():
            outcome = prompt_task.failed(Cause.CANCELED, why_stopped(Cause.CANCELED))
        elif (error := task.exception()) is not None:
            logger.error("prompt task %s broke off", uid, exc_info=error)
            outcome = prompt_task.failed(Cause.ERROR, f"{type(error).__name__}: {error}")
        else:
            outcome = task.result()
        report(outcome if isinstance(outcome, Returned) else Ended(uid, outcome))

    def cancel(self, uids: Collection[str]) -> None:
        for uid in uids:
            if uid in self._tasks:
                self._tasks[uid].cancel()

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        prompts: defaultdict[int, list[Prompt]] = defaultdict(list)
        for uid in priorities.keys() & self._prompt_tasks.keys():
            task = self._prompt_tasks[uid]
            task.priority = priorities[uid]
            prompts[task.priority] += task.asked
        for priority, asked in prompts.items():
            self._batcher.prioritize(asked, priority)

    def remove_server(self, server: ChatServer, message: str) -> None:
        """This server is gone, with its prompts. Once no server is left, tasks that were not sent are returned."""
        self._batcher.remove_server(server, message)

    def add_server(self, server: ChatServer) -> None:
        """Send prompts to this server too."""
        self._batcher.add_server(server)

    async def close(self) -> None:
        """Cancel every task; return when no server works on any."""
        tasks = list(self._tasks.values())
        self.cancel(list(self._tasks))
        if tasks:
            await asyncio.wait(tasks)
        await self._checks.close()
        await self._batcher.close()


class _PromptTask:
    """One task with prompts, from its submission to its outcome."""

    def __init__(
        self,
        task_run: TaskRun,
        report: Report,
        read: Reader,
        batcher: PromptBatcher,
        checks: AnswerChecker,
        defaults: Defaults,
        servers: Sequence[ChatServer],
    ) -> None:
        self.task_run, self.report, self.read = task_run, report, read
        self.batcher, self.checks, self.defaults, self.servers = batcher, checks, defaults, servers
        self.work = _completion_of(task_run)
        self.values: dict[str, Any] = {}
        """The results that were read for Refs, by uid."""
        self.asked: list[Prompt] = []
        self.priority = task_run.spec.priority
        self.started: float | None = None
        self.time_limit = asyncio.timeout(None)

    async def run(self) -> Outcome | Returned:
        timeout_s = self.task_run.spec.timeout_s
        try:
            self.work = _with_values(self.work, self._value_of)
            long = sum(len(each) for each in self._contents() if isinstance(each, tuple)) > _MANY_PARTS
            conversations, many = await asyncio.to_thread(self._conversations) if long else self._conversations()
            answers = await self._ask(self._prompts(conversations))
            return await self._outcome(answers, many)
        except InvalidTask as error:
            return self.failed(Cause.INVALID, str(error))
        except TimeoutError:
            return self.failed(Cause.TIMEOUT, why_stopped(Cause.TIMEOUT, timeout_s))
        except RequestRefused as refusal:
            server_fault = refusal.status >= 500 or refusal.status in _TRANSIENT_STATUSES
            return self.failed(Cause.ERROR if server_fault else Cause.INVALID, self._explained(refusal))
        except ServerLost as lost:
            if self.started is None:
                return Returned(self.task_run.spec.uid, str(lost))
            return self.failed(Cause.LOST, str(lost))

    def _conversations(self) -> tuple[list[Conversation], bool]:
        """The conversations to send, and whether the result of the task is a list.

        The result is also a list where the only prompt is a Ref to a list of texts.
        """
        system = self.defaults.system_prompt if self.work.system_prompt is None else self._text(self.work.system_prompt)
        before = [{"role": "system", "content": system}] if system else []
        if messages := [message for each in self.work.messages for message in self._messages(each)]:
            return [messages if messages[0]["role"] == "system" else [*before, *messages]], False
        texts, many = self._texts()
        return [[*before, {"role": "user", "content": text}] for text in texts], many

    def _messages(self, message: Message | Ref) -> Conversation:
        if isinstance(message, Message):
            return [{"role": message.role, "content": self._text(message.content)}]
        value = self._value_of(message)
        messages = value if isinstance(value, list | tuple) else [value]
        for each in messages:
            check_message(each)
        return [{"role": each["role"], "content": _as_text(each["content"])} for each in messages]

    def _contents(self) -> Iterator[Content]:
        yield from self.work.prompts
        yield from (message.content for message in self.work.messages if isinstance(message, Message))

    def _texts(self) -> tuple[list[str], bool]:
        first = self.work.prompts[0]
        if isinstance(first, Ref) and not self.work.many:
            value = self._value_of(first)
            if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
                return list(value), True
            return [_as_text(value)], False
        return [self._text(prompt) for prompt in self.work.prompts], self.work.many

    def _text(self, content: Content) -> str:
        parts = parts_of(content)
        return "".join(part if isinstance(part, str) else _as_text(self._value_of(part)) for part in parts)

    def _value_of(self, ref: Ref) -> Any:
        if self.task_run.bindings.get(ref.uid) == NOTHING:
            return None
        if ref.uid not in self.values:
            self.values[ref.uid] = _read_binding(ref.uid, self.task_run.bindings, self.read)
        try:
            return resolve_pointer(self.values[ref.uid], ref.path, contents=True)
        except InvalidTask as error:
            raise InvalidTask(f"of the result of {ref.uid}, {error}") from error

    def _prompts(self, conversations: list[Conversation]) -> list[Prompt]:
        parameters = _parameters(self.work, self.defaults)
        group = msgspec.json.encode([parameters, self.task_run.spec.timeout_s])  # unsorted: a schema's order counts
        return [Prompt(each, parameters, group, self._sent, self.priority) for each in conversations]

    async def _ask(self, prompts: list[Prompt]) -> list[Answer]:
        self.asked = prompts
        try:
            async with self.time_limit:
                self.batcher.ask(prompts)
                return await asyncio.gather(*(prompt.answer for prompt in prompts))
        except RequestRefused as refusal:
            if len(prompts) == 1:
                raise
            number = next(number for number, prompt in enumerate(prompts, 1) if prompt.has_failed)
            raise RequestRefused(refusal.status, f"prompt {number} of {len(prompts)}: {refusal}") from refusal
        finally:
            await self.batcher.withdraw(prompts)

    def _sent(self) -> None:
        """Report the start of the task, and start its time limit, when its first prompt is sent."""
        if self.started is None:
            self.started = time.time()
            if (timeout_s := self.task_run.spec.timeout_s) is not None:
                self.time_limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            self.report(Running(self.task_run.spec.uid, self.started))

    async def _outcome(self, answers: list[Answer], many: bool) -> Outcome:
        usage = _total_usage([answer.usage for answer in answers])
        written = [one for answer in answers for one in answer.written]
        length = sum(len(one.text) + _TOKEN_CHARS * len(one.logprobs or ()) for one in written)
        try:
            await self._check(answers)
            if length > INLINE_BYTES // 4:  # a character is up to 4 bytes
                value = await asyncio.to_thread(self._result_value, answers, many)
            else:
                value = self._result_value(answers, many)
        except SchemaMismatch as unfit:
            return self.failed(Cause.ERROR, str(unfit), usage)
        cut = sum(one.cut for one in written)
        cut_note = f"{cut} of {len(written)} answers were cut off at max_tokens or the model's length" if cut else ""
        notes = tuple(filter(None, (cut_note, self.defaults.note)))
        return Outcome(
            state=TaskState.DONE, started=self.started, ended=time.time(), value=value, usage=usage, notes=notes
        )

    def _result_value(self, answers: list[Answer], many: bool) -> Value:
        results_of_each = [[self._result(one) for one in answer.written] for answer in answers]
        results = [result for (result,) in results_of_each] if self.work.n is None else results_of_each
        return encode(results if many else results[0], self.task_run.results_folder)

    def _result(self, written: WrittenText) -> Any:
        if self.work.json_schema is not None:
            return msgspec.json.decode(written.text)
        if self.work.logprobs is None:
            return written.text
        if written.logprobs is None:
            raise SchemaMismatch("the server gave no logprobs; leave them out, or ask another server")
        return {"text": written.text, "logprobs": msgspec.to_builtins(written.logprobs)}

    async def _check(self, answers: list[Answer]) -> None:
        """Raise SchemaMismatch where an answer was cut or does not fit the schema; does nothing without a schema."""
        if not isinstance(schema := self.work.json_schema, bytes):
            return
        written = [one for answer in answers for one in answer.written]
        cut = next((index for index, one in enumerate(written) if one.cut), None)
        if cut is not None:
            problem = f"was cut at {self._most_tokens()} before its object was whole. {_CUT_ADVICE}"
            raise SchemaMismatch(f"{_answer_name(cut, answers)} {problem}")
        mismatch = await self.checks.first_mismatch(schema, [one.text for one in written])
        if mismatch is not None:
            raise SchemaMismatch(f"{_answer_name(mismatch.index, answers)} {mismatch.problem}")

    def _most_tokens(self) -> str:
        most = _parameters(self.work, self.defaults).get("max_tokens")
        return "the model's length" if most is None else f"max_tokens ({most})"

    def _explained(self, refusal: RequestRefused) -> str:
        """The server's message, with advice where the reason is known."""
        model = self.work.model if isinstance(self.work.model, str) else self.defaults.model
        served = self.servers[0].models
        if refusal.status == 404 and served and model not in served:
            return f"{UnknownName('model', model, served)} The server says: {refusal}"
        if refusal.status in (401, 403):
            return f"{refusal}. Give the backend another api_key."
        return str(refusal)

    def failed(self, cause: Cause, message: str, usage: Usage | None = None) -> Outcome:
        state = TaskState.CANCELED if cause is Cause.CANCELED else TaskState.FAILED
        return Outcome(state=state, started=self.started, ended=time.time(), cause=cause, error=message, usage=usage)


def _answer_name(index: int, answers: Sequence[Answer]) -> str:
    """The words for the text at this index, counted through all answers, as in "answer 2 of 3 to prompt 1 of 4"."""
    of_each = len(answers[0].written)
    one = f"answer {index % of_each + 1} of {of_each}" if of_each > 1 else "the answer"
    return f"{one} to prompt {index // of_each + 1} of {len(answers)}" if len(answers) > 1 else one


def _completion_of(task_run: TaskRun) -> Completion:
    assert isinstance(task_run.spec.work, Completion), "the session routes by kind, and check_prompts looks again"
    return task_run.spec.work


def _parameters(work: Completion, defaults: Defaults) -> dict[str, Any]:
    own = {
        "model": work.model or defaults.model,
        "temperature": work.temperature,
        "max_tokens": work.max_tokens,
        "top_p": work.top_p,
        "top_k": work.top_k,
        "seed": work.seed,
        "n": None if work.n == 1 else work.n,
        "logprobs": None if work.logprobs is None else True,
        "top_logprobs": work.logprobs,
        "stop": work.stop_sequences or None,
        "response_format": _response_format(work.json_schema, defaults.schema_options),
    }
    parameters = {**defaults.parameters, **{name: value for name, value in own.items() if value is not None}}
    if parameters.get("top_p") == 0.0:
        parameters["top_p"] = _MIN_TOP_P
    return parameters


def _response_format(schema: bytes | Ref | None, options: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(schema, bytes):
        return None
    asked = {**msgspec.json.decode(schema), **options}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked, "strict": True}}


def _with_values(work: Completion, value_of: Callable[[Ref], Any]) -> Completion:
    """Replace the Refs among the sampling parameters by their values. Raises InvalidTask where a value is not valid."""
    given = {field: value_of(value) for field in SAMPLING if isinstance(value := getattr(work, field), Ref)}
    if not given:
        return work
    asked = given.get("max_tokens")
    if work.most_tokens is not None and isinstance(asked, int) and asked > work.most_tokens:
        raise InvalidTask(f"max_tokens is {asked}; the most here is {work.most_tokens} (setting max_answer_tokens).")
    return msgspec.structs.replace(work, **{field: check_parameter(field, value) for field, value in given.items()})


def _read_binding(uid: str, bindings: Mapping[str, Value], read: Reader) -> Any:
    if uid not in bindings:
        raise InvalidTask(f"{uid} has no result that a prompt could hold.")
    try:
        return read(bindings[uid])
    except InvalidTask as error:
        raise InvalidTask(f"{uid} cannot be part of a prompt: {error}") from error
    except Exception as error:  # unpickling runs the user's own code
        raise InvalidTask(f"the result of {uid} cannot be read: {type(error).__name__}: {error}") from error


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidTask(
            f"a {type(value).__name__} cannot be part of a prompt: {error}. Return a text, or plain data as in JSON."
        ) from error


def _total_usage(usages: list[Usage | None]) -> Usage | None:
    known = [usage for usage in usages if usage is not None]
    if not known or len(known) < len(usages):
        return None
    return Usage(sum(usage.prompt_tokens for usage in known), sum(usage.completion_tokens for usage in known))
