"""A task that sends prompts to a language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rhapsody_mcp.model.errors import InvalidTask, refuse_other_fields, refuse_unknown
from rhapsody_mcp.model.sampling import SAMPLING, check_message, check_parameter
from rhapsody_mcp.model.specs import Completion, Layout, Message, TaskSpec
from rhapsody_mcp.model.values import Ref
from rhapsody_mcp.runtime.process_layout import read_timeout
from rhapsody_mcp.runtime.serialization import Encoder
from rhapsody_mcp.runtime.tasks.task import COMMON_FIELDS, Part, Task, Text, content, reference, tasks_in

__all__ = ["AITask"]

_PLACES = {
    "inference_endpoint": 'the backend of the session: EndpointInferenceBackend("http://127.0.0.1:8000/v1")',
    "timeout": 'task_backend_specific_kwargs={"timeout": seconds}',
}
"""Field names of other libraries, and how AITask expresses them."""
_AI_FIELDS = ("prompt", "messages", "system_prompt", *SAMPLING, "task_backend_specific_kwargs")


class AITask(Task):
    """A prompt, a list of prompts, or the messages of a conversation, for a language model.

    prompt          a text or a list of texts; a task stands for its return value, and a Text holds results
    messages        instead of prompt: dicts with role ("system", "user" or "assistant") and content, a text like
                    prompt; a task stands for a message or a list of messages
    model           a name that the backend serves; default is the backend's own model
    system_prompt   instructions that come before the prompt
    temperature     0.0 to 2.0        top_p   0.0 to 1.0        top_k   a positive number, or -1 for all
    max_tokens      the most tokens to generate for one prompt
    seed            a whole number: the same seed, prompt and server give the same answer
    n               how many answers each prompt gets, up to 128, as a list
    logprobs        the log probability of each token, and of this many of the likeliest tokens, up to 20
    stop_sequences  texts that end the answer and are not part of it
    json_schema     a JSON schema of an object; the answer must match the schema
    task_backend_specific_kwargs   timeout in seconds

    For model, and from temperature to json_schema, a task or a Part stands for its value, which is checked when this
    task starts.

    `return_value` and `response` are the answer: a text for a prompt, a list of answers in order for a list of prompts.
    With n, the answer to a prompt is a list of n answers. With json_schema, an answer is the object itself, as a dict;
    the task is FAILED where an answer was cut or does not match. With logprobs, an answer is `{"text": ..., "logprobs":
    [{"token": ..., "logprob": ..., "top_logprobs": [{"token": ..., "logprob": ...}, ...]}, ...]}`.
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
        refuse_other_fields("AITask", common, _PLACES)
        refuse_unknown("field of AITask", common.keys() - COMMON_FIELDS, (*_AI_FIELDS, *COMMON_FIELDS))
        super().__init__(**common)
        self.prompt = prompt
        self.model = model
        messages = [messages] if isinstance(messages, Task | Part) else messages
        optional: dict[str, Any] = {"messages": messages, "system_prompt": system_prompt, "temperature": temperature}
        optional |= {
            "max_tokens": max_tokens,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "n": n,
            "logprobs": logprobs,
        }
        optional |= {"stop_sequences": stop_sequences, "json_schema": json_schema}
        for field, value in optional.items():
            if value is not None:
                setattr(self, field, value)
        self.task_backend_specific_kwargs = dict(task_backend_specific_kwargs or {})
        refuse_unknown(
            "key of an AITask's task_backend_specific_kwargs", self.task_backend_specific_kwargs, ["timeout"]
        )
        self._timeout_s = read_timeout(self.task_backend_specific_kwargs)
        if logprobs is not None and json_schema is not None:
            raise InvalidTask("logprobs and json_schema contradict each other; give one of them.", field="logprobs")
        self._refuse_wrong_texts()
        self._checked = {
            field: check_parameter(field, value)
            for field, value in self._sampling()
            if not isinstance(value, Task | Part)
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
        """The sampling parameters that are set."""
        return ((field, value) for field in SAMPLING if (value := getattr(self, field)) is not None)

    def _refuse_wrong_texts(self) -> None:
        if self.messages is not None:
            for field in ("prompt", "system_prompt"):
                if getattr(self, field) is not None:
                    raise InvalidTask(
                        f"messages and {field} contradict each other; write it as one of the messages.",
                        field="messages",
                    )
            _refuse_messages(self.messages)
            return
        if not self._prompts:
            raise InvalidTask("prompt is an empty list; give a text or at least one text.", field="prompt")
        for prompt in self._prompts:
            if isinstance(prompt, dict) and "role" in prompt:
                raise InvalidTask(
                    "prompt holds a message with a role; give the messages of a chat as messages.", field="prompt"
                )
            _refuse_content("prompt", prompt)
        if self.system_prompt is not None:
            _refuse_content("system_prompt", self.system_prompt)

    @property
    def _prompts(self) -> Sequence[Any]:
        return self.prompt if isinstance(self.prompt, list | tuple) else [self.prompt]

    _extra_keys = (*Task._extra_keys, "response", "messages", "system_prompt", *SAMPLING)

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
        return tasks_in([self.prompt, self.messages, self.system_prompt, *(value for _, value in self._sampling())])

    def spec(self, encoder: Encoder) -> TaskSpec:
        referring: dict[str, Any] = {
            field: ref for field, value in self._sampling() if (ref := reference(value)) is not None
        }
        work = Completion(
            prompts=() if self.messages else tuple(map(content, self._prompts)),
            messages=tuple(map(_message, self.messages or ())),
            many=self.many,
            system_prompt=None if self.system_prompt is None else content(self.system_prompt),
            **self._checked,
            **referring,
        )
        return TaskSpec(
            uid=self.uid, work=work, layout=Layout("native"), timeout_s=self._timeout_s, priority=self.priority
        )


def _message(message: Any) -> Message | Ref:
    return reference(message) or Message(message["role"], content(message["content"]))


def _refuse_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidTask(
            f'messages is {messages!r}; valid is a list such as [{{"role": "user", "content": "..."}}].',
            field="messages",
        )
    for message in messages:
        if not isinstance(message, Task | Part):
            check_message(message)
            _refuse_content("content", message["content"])


def _refuse_content(field: str, text: object) -> None:
    parts = text.parts if isinstance(text, Text) else (text,)
    for part in parts:
        if not isinstance(part, str | Task | Part):
            valid = f"a text, or a task that stands for its result{_OR_LIST.get(field, '')}"
            raise InvalidTask(
                f"{field} is a {type(part).__name__}; valid is {valid}. Texts alone are taken.", field=field
            )
    if all(isinstance(part, str) and not part.strip() for part in parts):
        raise InvalidTask(f"{_EMPTY.get(field, field)} is empty; write what the model shall read.", field=field)


_OR_LIST = {"prompt": ", or a list of these"}
_EMPTY = {"prompt": "a prompt", "content": "the content of a message"}
