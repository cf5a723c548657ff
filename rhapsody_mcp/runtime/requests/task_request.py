"""A task request: the fields with which an agent describes a task."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from rhapsody_mcp.model.errors import InvalidTask, refuse_unknown
from rhapsody_mcp.model.sampling import MAX_ANSWERS, MAX_LOGPROBS, SAMPLING
from rhapsody_mcp.runtime.dataflow.references import parse_texts, referenced_names
from rhapsody_mcp.runtime.requests.field_types import UNION_TAGS, Name

__all__ = [
    *(
        "COMMON_FIELDS",
        "FIELDS",
        "TEXT_FIELDS",
        "DATA_FIELDS",
        "STAND_IN_FIELDS",
        "Env",
        "RankGroup",
        "StandIn",
        "TaskRequest",
    ),
    *("COMPARISONS", "condition_value", "is_stand_in"),
]


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _numbers_as_text(env: Any) -> Any:
    """The environment with numbers as texts."""
    if not isinstance(env, dict):
        return env
    return {name: str(value) if type(value) in (int, float) else value for name, value in env.items()}


Env = Annotated[dict[str, str | None], BeforeValidator(_numbers_as_text)]
"""Environment variables; null removes a variable."""


def is_stand_in(value: object) -> bool:
    """Whether the value is an object that stands for a result or an item."""
    keys = value.keys() - {"path"} if isinstance(value, dict) else None
    return keys == {"ref"} or keys == {"item"}


COMPARISONS = frozenset({"above", "below", "equals", "exists"})
"""The keys of a condition that say what its value must be."""


def condition_value(when: dict[str, Any]) -> dict[str, Any]:
    """What a condition compares: a reference, or a stand-in for the item. Raises InvalidTask for another form."""
    refuse_unknown("key of when", when, ("ref", "item", "path", *COMPARISONS))
    value = {key: part for key, part in when.items() if key not in COMPARISONS}
    if not is_stand_in(value) or value.get("item", True) is not True:
        raise InvalidTask('when needs one of "ref": name and "item": true, with "path" for a part.', field="when")
    return value


def _refuse_bool(value: Any) -> Any:
    """Refuse true and false, which Python accepts as numbers."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "true and false are no numbers")
    return value


_T = TypeVar("_T")
StandIn = dict[str, Any]
OrStandIn = Annotated[
    Annotated[_T, Tag(UNION_TAGS[0])] | Annotated[StandIn, Tag(UNION_TAGS[1])],
    Discriminator(lambda value: UNION_TAGS[is_stand_in(value)]),
]
"""The type of a field that takes a value or a stand-in."""
_NUMBER = BeforeValidator(_refuse_bool)


class RankGroup(_StrictModel):
    # ranks started alike; no docstring: it would go into the tool's schema
    ranks: Annotated[int, Field(ge=1)]
    env: Env | None = None
    cwd: str | None = None
    policy: Annotated[
        dict[str, Any] | None,
        Field(description="host_name, cpu_affinity, gpu_affinity"),
    ] = None

    @property
    def template(self) -> dict[str, Any]:
        return self.model_dump(exclude={"ranks"}, exclude_none=True)


class TaskRequest(_StrictModel):
    # one task: exactly one of source, function, executable, prompt and messages; the card says so
    name: Annotated[Name | None, Field(description='How others refer to it, e.g. "train".')] = None
    source: Annotated[
        str | None,
        Field(description='Text of a function, e.g. "def add(a, b):\\n    return a + b".'),
    ] = None
    entry: Annotated[str | None, Field(description="Its function to call; default: the last.")] = None
    function: Annotated[
        str | None,
        Field(description='Function to import, e.g. "math:sqrt", or a registered name.'),
    ] = None
    args: Annotated[
        list[Any] | None,
        Field(description='Of source or function, e.g. [2, {"ref": "samples"}].'),
    ] = None
    kwargs: Annotated[dict[str, Any] | None, Field(description='Of source or function, e.g. {"steps": 100}.')] = None
    executable: Annotated[str | None, Field(description='Path, or name on PATH, e.g. "/bin/hostname".')] = None
    arguments: Annotated[
        list[Any] | None, Field(description='Of executable: texts, numbers, references, e.g. ["-n", 4].')
    ] = None
    stdout: Annotated[
        Literal["json"] | None, Field(description="Of executable: the result is the JSON that it prints.")
    ] = None
    outputs: Annotated[
        list[str] | None,
        Field(
            description='Files it leaves, e.g. ["a.json", "plots/*.png"]; its result is then '
            '{"result": ..., "files": {"plots": {"x.png": path}}}.'
        ),
    ] = None
    prompt: Annotated[
        str | list[Any] | dict[str, Any] | None,
        Field(description="Text, list of texts, or reference."),
    ] = None
    messages: Annotated[
        list[dict[str, Any]] | None,
        Field(description='A chat, e.g. [{"role": "user", "content": "Explain {ref:train/loss}."}].'),
    ] = None
    system_prompt: Annotated[
        str | dict[str, Any] | None, Field(description="Instructions that come before prompt.")
    ] = None
    model: Annotated[OrStandIn[str] | None, Field(description="Default is the backend's own.")] = None
    temperature: Annotated[
        OrStandIn[Annotated[float, Field(ge=0, le=2), _NUMBER]] | None,
        Field(description="Default: the model's."),
    ] = None
    max_tokens: Annotated[
        OrStandIn[Annotated[int, Field(ge=1), _NUMBER]] | None, Field(description="Most tokens of one answer.")
    ] = None
    top_p: Annotated[
        OrStandIn[Annotated[float, Field(ge=0, le=1), _NUMBER]] | None, Field(description="Nucleus sampling.")
    ] = None
    top_k: Annotated[
        OrStandIn[Annotated[int, Field(ge=-1), _NUMBER]] | None, Field(description="Candidate tokens; -1 for all.")
    ] = None
    seed: Annotated[
        OrStandIn[Annotated[int, Field(ge=0), _NUMBER]] | None, Field(description="Repeats its answer.")
    ] = None
    n: Annotated[
        OrStandIn[Annotated[int, Field(ge=1, le=MAX_ANSWERS), _NUMBER]] | None,
        Field(description="Answers to each prompt, as a list."),
    ] = None
    logprobs: Annotated[
        OrStandIn[Annotated[int, Field(ge=0, le=MAX_LOGPROBS), _NUMBER]] | None,
        Field(description="Tokens too, with so many likely ones each."),
    ] = None
    stop_sequences: Annotated[OrStandIn[list[str]] | None, Field(description="Texts that end an answer.")] = None
    json_schema: Annotated[
        dict[str, Any] | None,
        Field(description="JSON schema of the answer, which is then an object."),
    ] = None
    backend: Annotated[str | None, Field(description="Default: the session's first that can run it.")] = None
    process: Annotated[bool, Field(description="true: a process of its own.")] = False
    ranks: Annotated[
        int | None,
        Field(ge=1, description="Processes of a job; RHAPSODY_RANK numbers them."),
    ] = None
    ranks_per_node: Annotated[int | None, Field(ge=1, description="Most ranks on a node.")] = None
    mpi: Annotated[bool, Field(description="true: the ranks speak MPI.")] = False
    process_templates: Annotated[
        list[RankGroup] | None,
        Field(description='A job of different processes, e.g. [{"ranks": 2}, {"ranks": 1, "cwd": "head"}].'),
    ] = None
    cores: Annotated[
        float | None, Field(ge=0.01, le=1_000_000, description="Of the task or each rank; default 1, not bound.")
    ] = None
    gpus: Annotated[int | None, Field(ge=0, le=1_000_000, description="Likewise.")] = None
    memory_gb: Annotated[float | None, Field(ge=0.001, le=1_000_000, description="Likewise; more ends it.")] = None
    env: Annotated[
        Env | None,
        Field(description='Environment variables, e.g. {"OMP_NUM_THREADS": "1"}.'),
    ] = None
    cwd: Annotated[str | None, Field(description="Working directory.")] = None
    python: Annotated[str | None, Field(description="Interpreter or virtual environment.")] = None
    packages: Annotated[list[str] | None, Field(description='To install first, e.g. ["humanize==4.*"].')] = None
    container: Annotated[str | None, Field(description='Image, e.g. "a.sif", "docker://python:3.12".')] = None
    setup: Annotated[list[str] | None, Field(description='Run before it, e.g. ["module load cuda"].')] = None
    timeout_s: Annotated[float | None, Field(gt=0, description="FAILED after so long a run.")] = None
    for_each: Annotated[
        list[Any] | dict[str, Any] | Annotated[int, Field(ge=1, le=100_000, strict=True)] | None,
        Field(description='Items to run it for, each {"item": true}: a list, a reference to one, or a number.'),
    ] = None
    after: Annotated[list[str] | None, Field(description="Others that must be DONE first.")] = None
    retries: Annotated[int, Field(ge=0, le=100, description="How often to try again after a failure.")] = 0
    retry_delay_s: Annotated[float, Field(ge=0, le=3600, description="Before the first retry; doubles, up to 60.")] = (
        1.0
    )
    on_upstream_failure: Annotated[
        Literal["cancel", "run"],
        Field(description='"run": it runs, with null for what failed.'),
    ] = "cancel"

    when: Annotated[
        dict[str, Any] | None,
        Field(
            description='Else skipped (no failure): {"ref": "score", "path": "/loss", "below": 0.1}; or above, equals, '
            "exists."
        ),
    ] = None

    priority: Annotated[int, Field(description="Of those that wait, the highest start first."), _NUMBER] = 0

    def given_fields(self) -> set[str]:
        """The fields that are set to another value than the default."""
        fields = type(self).model_fields
        return {field for field in self.model_fields_set if getattr(self, field) != fields[field].default}

    def references(self) -> set[str]:
        """The names of the tasks whose results the request uses. Raises InvalidTask for a malformed reference."""
        in_data = [getattr(self, field) for field in DATA_FIELDS]
        in_data += [value for field in STAND_IN_FIELDS if is_stand_in(value := getattr(self, field))]
        in_data += [condition_value(self.when)] if self.when is not None else []
        return set(referenced_names([*in_data, *(parse_texts(getattr(self, field)) for field in TEXT_FIELDS)]))


DATA_FIELDS = frozenset({"args", "kwargs", "for_each"})
"""Fields that may hold references at any depth."""
TEXT_FIELDS = frozenset({"arguments", "prompt", "messages", "system_prompt"})
"""Fields that may hold references at any depth, also in texts."""
STAND_IN_FIELDS = frozenset(SAMPLING)
"""Fields whose whole value may be a stand-in."""
_FLOW_FIELDS = {"for_each", "after", "retries", "retry_delay_s", "on_upstream_failure", "when", "priority"}
COMMON_FIELDS = {"name", "backend", "timeout_s", *_FLOW_FIELDS}
"""Fields of every form of task."""
_PROCESS_FIELDS = {
    *(
        "outputs",
        "process",
        "ranks",
        "ranks_per_node",
        "mpi",
        "process_templates",
        "env",
        "cwd",
        "cores",
        "gpus",
        "memory_gb",
        "python",
        "packages",
        "container",
        "setup",
    ),
}
_MODEL_FIELDS = {"system_prompt", *SAMPLING, *COMMON_FIELDS}
FIELDS = {
    "source": {"source", "entry", "args", "kwargs", *_PROCESS_FIELDS, *COMMON_FIELDS},
    "function": {"function", "args", "kwargs", *_PROCESS_FIELDS, *COMMON_FIELDS},
    "executable": {"executable", "arguments", "stdout", *_PROCESS_FIELDS, *COMMON_FIELDS},
    "prompt": {"prompt", *_MODEL_FIELDS},
    "messages": {"messages", *_MODEL_FIELDS - {"system_prompt"}},
}
"""The valid fields of a request, by its form: the field that says what the task runs."""
