"""Task specs: what a backend is given to run, checked, and with the user's objects encoded."""

from __future__ import annotations

from typing import Literal

import msgspec

from rhapsody_mcp.model.values import Ref, Value

__all__ = [
    *("Call", "Caps", "Command", "Completion", "Content", "Layout", "Message", "Mode", "Needs", "TaskRun", "RankGroup"),
    *("Role", "Software", "TaskSpec", "Template", "parts_of"),
]

Mode = Literal["native", "process", "job"]
Role = Literal["system", "user", "assistant"]


class Call(msgspec.Struct, frozen=True, tag="call", gc=False):
    """A call of a Python function.

    By `form`, `code` is a pickled function, a source text, or "module:function"; `entry` is the name of the function in
    a source text. `arguments` is a pickle of `(args, kwargs)`, in which a Ref is a persistent id; may be empty.
    `outputs` are patterns of files that become parts of the result.
    """

    form: Literal["pickle", "source", "module"]
    code: bytes
    entry: str = ""
    arguments: bytes = b""
    outputs: tuple[str, ...] = ()


Content = str | Ref | tuple[str | Ref, ...]
"""A text, or parts that are joined to one text. A Ref stands for a result: a text as it is, any other value as JSON."""


def parts_of(content: Content) -> tuple[str | Ref, ...]:
    return content if isinstance(content, tuple) else (content,)


class Command(msgspec.Struct, frozen=True, tag="command", gc=False):
    """A program and its arguments. Its value is its standard output: a text, or JSON. `outputs` as in Call."""

    executable: str
    arguments: tuple[Content, ...] = ()
    stdout: Literal["text", "json"] = "text"
    outputs: tuple[str, ...] = ()


class Message(msgspec.Struct, frozen=True, tag="message", gc=False):
    """One message of a conversation."""

    role: Role
    content: Content


class Completion(msgspec.Struct, frozen=True, tag="completion", kw_only=True, gc=False):
    """Prompts for a language model, or the messages of one conversation, all with the same parameters.

    A parameter of None means the server's default. The value of a Ref is read and checked when the task starts. In
    `messages` a Ref stands for one message or a list of messages; as the only prompt it may stand for a list of texts.
    `most_tokens` bounds the value of a Ref in `max_tokens`.

    The result is a list with one answer for each prompt, in order, if `many` is true, else the single answer. An answer
    is a text. With `json_schema`, a schema as JSON, an answer is the JSON object that the model wrote; with `logprobs`,
    a text and its tokens; with `n`, a list of `n` such values.
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
    """How a process is started. `env` is merged over the engine's environment; a None value removes the variable.

    `host_name`, `cpu_affinity` and `gpu_affinity` are the placement fields of Dragon's policies.
    """

    env: dict[str, str | None] = {}
    cwd: str | None = None
    host_name: str | None = None
    cpu_affinity: tuple[int, ...] = ()
    gpu_affinity: tuple[int, ...] = ()


class RankGroup(msgspec.Struct, frozen=True, gc=False):
    """So many ranks of a job that are started from the same template."""

    ranks: int
    template: Template


class Needs(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What each process of a task needs of its node.

    With `cores`, a whole number of at least 1, the process is bound to so many cores; a part of a core is only counted.
    A process whose `cores` is None counts as one core, and is not bound. `memory_gb` is in GB (10^9 bytes).
    """

    cores: float | None = None
    gpus: int = 0
    memory_gb: float | None = None

    def __bool__(self) -> bool:
        return self != _NO_NEEDS

    @property
    def counted_cores(self) -> float:
        return 1.0 if self.cores is None else self.cores

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)


class Software(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What the user's code finds around it; empty is that of the engine.

    `python` is an interpreter, or the folder of an environment. `packages` are requirements, for which an environment
    is made before a backend gets the task. `container` is an image, and `setup` are lines of bash that run before.
    `runtime` is the program that runs the image; empty for the first that is found.
    """

    python: str = ""
    packages: tuple[str, ...] = ()
    container: str = ""
    setup: tuple[str, ...] = ()
    runtime: str = ""

    def __bool__(self) -> bool:
        return self != _NO_SOFTWARE

    def over(self, session: Software) -> Software:
        """The software of a task with this one, in a session with the other. Packages of the task alone are for the
        Python of the session."""
        if self.python or self.container or not session:
            return self
        if self.packages:
            return msgspec.structs.replace(self, python="" if session.container else session.python)
        return msgspec.structs.replace(session, setup=(*session.setup, *self.setup))


_NO_NEEDS, _NO_SOFTWARE = Needs(), Software()


class Layout(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The processes of a task: none of its own (mode native), one (process), or several (job).

    `pmi` is set for a job of MPI ranks: "auto" selects the PMI that works here, "none" runs independent ranks.
    `ranks_per_node` bounds the ranks of a job on each node; None for no bound.
    `forked` is set for a program without any process template: the node agent may fork it, without Dragon's placement.
    """

    mode: Mode
    groups: tuple[RankGroup, ...] = ()
    pmi: Literal["auto", "pmix", "cray", "none"] | None = None
    forked: bool = False
    ranks_per_node: int | None = None
    needs: Needs = Needs()
    software: Software = Software()

    @property
    def ranks(self) -> int:
        return sum(group.ranks for group in self.groups) if self.groups else 0

    @property
    def cores(self) -> float:
        """The cores that all its processes hold together."""
        return self.ranks * self.needs.counted_cores

    @property
    def gpus(self) -> int:
        """The GPUs that all its processes hold together."""
        return self.ranks * self.needs.gpus

    @property
    def uses_mpi(self) -> bool:
        """Whether the ranks find each other through a PMI; they then end together, once one of them fails."""
        return self.pmi not in (None, "none")

    @property
    def templates(self) -> list[Template]:
        """The template of each rank, in rank order."""
        return [group.template for group in self.groups for _ in range(group.ranks)]


class TaskSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A task for a backend, before the values of its Refs are known. Of waiting tasks, the one with the highest
    `priority` starts first."""

    uid: str
    work: Call | Command | Completion
    layout: Layout
    timeout_s: float | None = None
    priority: int = 0


class Caps(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Limits in bytes: of an encoded result, and of the kept part of each stdout and stderr; None for no limit.

    A pickled exception of up to `exception_bytes` is sent together with its text; with 0, none is sent.
    """

    result_bytes: int | None = None
    output_bytes: int | None = None
    exception_bytes: int = 64 * 1024


class TaskRun(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A task that can start. `bindings` are the values of its Refs, by uid.

    `results_folder` is for the files of large results and outputs. `attempt` is 1 for the first start of the task.
    `resumed` is True where this attempt has started already, in the allocation of an earlier service. `variables` are
    the trace context, for the environment of the task's processes.
    """

    spec: TaskSpec
    bindings: dict[str, Value]
    results_folder: str
    attempt: int = 1
    resumed: bool = False
    variables: dict[str, str] = {}
