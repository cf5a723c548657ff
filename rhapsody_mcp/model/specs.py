"""What a task is asked to do, as a backend gets it: checked, and with its user objects encoded."""

from __future__ import annotations

from typing import Literal

import msgspec

from rhapsody_mcp.model.values import Ref, Value

__all__ = [
    *("Call", "Caps", "Command", "Completion", "Content", "Layout", "Message", "Mode", "TaskRun", "RankGroup", "Role"),
    *("TaskSpec", "Template", "parts_of"),
]

Mode = Literal["native", "process", "job"]
Role = Literal["system", "user", "assistant"]


class Call(msgspec.Struct, frozen=True, tag="call", gc=False):
    """A Python function with its arguments.

    `code` is a pickled function, a source text, or "module:function", by `form`; `entry` names the function in
    a source text. `arguments` is a pickle of `(args, kwargs)` in which a Ref is a persistent id; empty for none.
    """

    form: Literal["pickle", "source", "module"]
    code: bytes
    entry: str = ""
    arguments: bytes = b""


Content = str | Ref | tuple[str | Ref, ...]
"""A text. A Ref stands for a result, as it is where that is a text, else as JSON; several parts are one text."""


def parts_of(content: Content) -> tuple[str | Ref, ...]:
    return content if isinstance(content, tuple) else (content,)


class Command(msgspec.Struct, frozen=True, tag="command", gc=False):
    """A program and its arguments."""

    executable: str
    arguments: tuple[Content, ...] = ()


class Message(msgspec.Struct, frozen=True, tag="message", gc=False):
    """One message of a conversation."""

    role: Role
    content: Content


class Completion(msgspec.Struct, frozen=True, tag="completion", kw_only=True, gc=False):
    """Prompts for a language model, or the messages of one conversation, all with the same parameters. None means the
    server's default, and a Ref the value that it stands for, which is looked at when the task starts.

    A Ref among the messages stands for one, or for a list of them. `most_tokens` bounds a max_tokens that is a Ref.
    `many` says whether the result is a list (one answer a prompt, in order) or the single answer. A Ref as the only
    prompt may stand for a list of texts. With `json_schema`, a schema as JSON, an answer is the object that the model
    wrote; with `logprobs` a text and its tokens; else it is a text. With `n` it is a list of so many.
    """

    prompts: tuple[Content, ...] = ()
    messages: tuple[Message | Ref, ...] = ()
    many: bool = False
    model: str | Ref | None = None
    system_prompt: Content | None = None
    temperature: float | Ref | None = None
    max_tokens: int | Ref | None = None
    top_p: float | Ref | None = None
    top_k: int | Ref | None = None
    seed: int | Ref | None = None
    n: int | Ref | None = None
    logprobs: int | Ref | None = None
    stop_sequences: tuple[str, ...] | Ref | None = None
    json_schema: bytes | Ref | None = None
    most_tokens: int | None = None


class Template(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """How a process is started. `env` is merged over the engine's; a None value removes the variable.

    `policy` holds Dragon's placement fields: host_name, cpu_affinity, gpu_affinity.
    """

    env: dict[str, str | None] = {}
    cwd: str | None = None
    host_name: str | None = None
    cpu_affinity: tuple[int, ...] = ()
    gpu_affinity: tuple[int, ...] = ()


class RankGroup(msgspec.Struct, frozen=True, gc=False):
    """`ranks` processes started alike."""

    ranks: int
    template: Template


class Layout(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Which processes a task gets: none of its own (native), one (process), or several (job).

    `pmi` is set for a job whose ranks speak MPI to each other: "auto" takes the PMI that works here, "none" runs
    independent ranks. `forked` is set for a program that nothing was said of: its process needs no placing by Dragon.
    """

    mode: Mode
    groups: tuple[RankGroup, ...] = ()
    pmi: Literal["auto", "pmix", "cray", "none"] | None = None
    forked: bool = False

    @property
    def ranks(self) -> int:
        return sum(group.ranks for group in self.groups) if self.groups else 0

    @property
    def templates(self) -> list[Template]:
        """One for each rank, in rank order."""
        return [group.template for group in self.groups for _ in range(group.ranks)]


class TaskSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A task as a backend gets it."""

    uid: str
    work: Call | Command | Completion
    layout: Layout
    timeout_s: float | None = None


class Caps(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """How many bytes a result may have, encoded, and how many of a stdout or stderr are kept; None for any number.

    A pickled exception of up to `exception_bytes` is sent beside its words; 0 is for where nobody may open one.
    """

    result_bytes: int | None = None
    output_bytes: int | None = None
    exception_bytes: int = 64 * 1024


class TaskRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A task that can start: the values that its Refs stand for, by uid, and the folder for what is large.

    `attempt` is 1 for its first start.
    """

    spec: TaskSpec
    bindings: dict[str, Value]
    folder: str
    attempt: int = 1
