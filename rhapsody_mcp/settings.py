"""The settings, and their YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
import yaml
from msgspec import to_builtins
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from rhapsody_mcp.cards import toolset_names
from rhapsody_mcp.model.errors import InvalidSettings, UnknownName, nearest
from rhapsody_mcp.schedulers.options import AllocationProfile, read_profiles

__all__ = ["SECRETS", "Settings", "read_settings", "settings_file"]

SECRETS = (
    *("*TOKEN", "*SECRET*", "*PASSWORD*", "*PASSWD", "*PASSPHRASE*", "*_PWD", "*_PAT", "*CREDENTIAL*"),
    *("*API_KEY*", "*APIKEY*", "*ACCESS_KEY*", "*PRIVATE_KEY*", "SSH_AUTH_SOCK", "OTEL_EXPORTER_OTLP_*HEADERS"),
)
"""Patterns of the names of environment variables that hold secrets, or lead to them."""

Profiles = Annotated[dict[str, AllocationProfile], PlainValidator(read_profiles), PlainSerializer(to_builtins)]


class Settings(BaseModel):
    """The choices of the person who runs the server. Every key has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    wait_default_s: Annotated[float, Field(gt=0)] = 25.0
    """How long wait_tasks waits when it is not told, in seconds; 4 s where the client may give a call 5."""
    wait_cap_s: Annotated[float, Field(gt=0)] = 55.0
    """The longest that one wait_tasks waits; many clients give up on a call after 60 s."""
    engine_idle_s: Annotated[float, Field(gt=0)] | None = 900.0
    """How long a session's engine has no task before it is stopped, in seconds; the next task starts it again. null
    for never."""
    stall_s: Annotated[float, Field(ge=1)] = 10.0
    """A worker or an engine that is stopped (SIGSTOP), or does not answer, for so long counts as dead, in seconds."""
    vllm_health_s: Annotated[float, Field(gt=0)] = 5.0
    """How often a vLLM server is asked whether it works, in seconds; after three bad answers it counts as dead."""
    result_bytes: Annotated[int, Field(ge=256, le=10_000)] = 8192
    """How much of a result one get_result returns, in bytes."""
    notice_interval_s: Annotated[float, Field(ge=0)] = 1.0
    """A subscriber hears of each resource's changes at once, and then at most once in this time, in seconds."""
    default_model: str = "shipped"
    """The model of the vllm backend where create_session names none: a path, a hub name, or "shipped"."""
    default_num_workers: Annotated[int, Field(ge=1)] | None = None
    """Worker processes of a session where create_session names no number; null for one a core."""
    endpoint_url: str | None = None
    """An OpenAI-compatible server that sessions use for prompts when they ask for the endpoint backend."""
    endpoint_model: str | None = None
    """A model that it serves; null for its first."""
    endpoint_api_key: str | None = None
    """Sent to `endpoint_url` and to no other address."""
    budget_tasks: Annotated[int, Field(ge=0)] | None = 10_000
    """How many tasks a session takes before submit_tasks asks the person; null for any number."""
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """The same for the sum of max_tokens over its prompts; one that does not say it counts as none."""
    budget_node_hours: Annotated[float, Field(ge=0)] | None = None
    """How many node-hours the open sessions may use in all, at most, before create_session asks the person; null for
    any number."""
    allocation_profiles: Profiles = {}
    """Presets and limits of sessions with nodes, by name, as in {gpu: {partition: gpu, account: m1234, max_nodes: 8}};
    the keys are in docs/allocations.md."""
    default_profile: str | None = None
    """The profile of sessions with nodes whose scheduler names none; null for no profile."""
    max_sessions: Annotated[int, Field(ge=1)] | None = 32
    """How many sessions may be open at once; null for any number, as in all keys that begin with max_."""
    max_session_tasks: Annotated[int, Field(ge=1)] | None = 100_000
    """How many tasks one session takes in its life, each one of a for_each too."""
    max_open_tasks: Annotated[int, Field(ge=1)] | None = 50_000
    """How many tasks may be waiting, queued or running at once, in all sessions together."""
    max_session_prompts: Annotated[int, Field(ge=0)] | None = 100_000
    """How many prompts one session sends to a model, each one of a list too."""
    max_session_tokens: Annotated[int, Field(ge=0)] | None = None
    """The most that max_tokens adds up to over a session's prompts; each prompt must say it then."""
    max_answer_tokens: Annotated[int, Field(ge=1)] | None = 131_072
    """The largest max_tokens of a prompt."""
    max_task_s: Annotated[float, Field(gt=0)] | None = 604_800.0
    """The longest that a task runs, in seconds: a task's timeout_s may not be longer."""
    default_task_s: Annotated[float, Field(gt=0)] | None = None
    """How long a task runs that has no timeout_s, in seconds; null for max_task_s."""
    max_result_bytes: Annotated[int, Field(ge=1024)] | None = 256 * 1024**2
    """The largest result of a function or a for_each, encoded, and the most that the files of outputs have together; a
    larger one makes its task FAILED."""
    max_output_bytes: Annotated[int, Field(ge=4096)] | None = 64 * 1024**2
    """How much of a task's stdout, and of its stderr, is kept: of more, the beginning and the end. The same of each
    rank."""
    max_held_bytes: Annotated[int, Field(ge=1024**2)] | None = 2 * 1024**3
    """How much tasks, with their arguments, prompts and short results, may take in the server's memory, in all open
    sessions together."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 1024**3
    """Nothing is submitted while less than this is free on the disks of results and of running tasks."""
    allow_source: bool = True
    """Whether tasks may bring functions as text, and sessions setup lines and hosts; where not, functions are
    imported."""
    allowed_executables: tuple[str, ...] | None = None
    """Patterns of the programs that tasks may run, by their full paths with links followed, as in [/usr/bin/*,
    /opt/sim/*]; null for all. What source and modules do is not held to it: forbid those too."""
    allowed_modules: tuple[str, ...] | None = None
    """Patterns of the functions that tasks may import, as in ["numpy.*", "mysim:run"]; null for all."""
    allowed_folders: tuple[Path, ...] | None = None
    """The folders that agents may name, with all in them: for cwd, config_file, models and exports; null for all."""
    withheld_variables: tuple[str, ...] = SECRETS
    """Patterns of environment variables that tasks do not inherit. A vLLM server keeps HF_TOKEN, to download, unless
    it is listed by its full name."""
    container_runtime: Literal["apptainer", "singularity", "podman"] | None = None
    """What runs the containers of tasks; null for the first of these that is on PATH of the node."""
    pilot_idle_s: Annotated[float, Field(gt=0)] = 900.0
    """A pilot that has no task, and to which no service has spoken for so long, in seconds, gives its nodes back."""
    keep_sessions_days: Annotated[float, Field(gt=0)] = 30.0
    """An open session that has nothing to do, and that nobody has used for so long, is closed, and its results are
    deleted."""
    keep_reports_days: Annotated[float, Field(ge=0)] = 30.0
    """The report of a session that was closed is kept for so long; 0 keeps none."""
    service_idle_s: Annotated[float, Field(gt=0)] = 1800.0
    """The service ends once it has had no client and no open session for so long, in seconds."""
    read_only: bool = False
    """Offer only the tools that change nothing."""
    toolsets: tuple[str, ...] | None = None
    """Offer only the tools of these folders of tools/, as in [sessions, tasks]; null for all."""
    http_token_file: Path | None = None
    """A file that holds a bearer token of your own, which HTTP clients may send and must: without it, a token is asked
    for only where other machines or other users connect. `rhapsody-mcp token create` makes tokens."""
    http_allowed_hosts: tuple[str, ...] = ()
    """More names by which HTTP clients may call this host, such as that of a proxy."""
    http_requests_per_s: Annotated[float, Field(gt=0)] = 50.0
    """How many requests a second one HTTP client (who has one token) may send; those of 4 s may come at once."""
    http_connections: Annotated[int, Field(ge=2)] = 512
    """How many HTTP connections there may be at once; half of them for the requests of one client."""
    http_slow_s: Annotated[float, Field(gt=0)] = 30.0
    """How long an HTTP client may take to send the head of a request, and then its body, in seconds."""
    request_bytes: Annotated[int, Field(ge=65_536)] = 4 * 1024**2
    """The longest request, over HTTP, the socket or stdin."""
    audit_bytes: Annotated[int, Field(ge=65_536)] = 10_000_000
    """The log of who called what begins a new file at this size."""
    audit_files: Annotated[int, Field(ge=1)] = 5
    """How many full files of it are kept."""


def settings_file() -> Path:
    """The user's own settings file, which need not exist."""
    return platformdirs.user_config_path("rhapsody-mcp") / "settings.yaml"


def read_settings(file: Path | None = None) -> Settings:
    """The settings in `file`, which must exist, or in the user's own file, which need not.

    Raises InvalidSettings, which names the file, the key and what is valid.
    """
    if file is None and not settings_file().is_file():
        return Settings()
    path = file or settings_file()
    try:
        settings = Settings(**_read_mapping(path))
    except ValidationError as error:
        raise InvalidSettings(f"{path}: {'; '.join(_problems(error))}.") from error
    for toolset in settings.toolsets or ():
        if toolset not in (known := toolset_names()):
            raise InvalidSettings(f"{path}: {UnknownName('toolset', toolset, known)}")
    if (profile := settings.default_profile) is not None and profile not in settings.allocation_profiles:
        raise InvalidSettings(
            f"{path}: default_profile: {UnknownName('profile', profile, settings.allocation_profiles)}"
        )
    return settings


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"the settings file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InvalidSettings(f"{path} is no valid YAML: {_yaml_problem(error)}.") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings(f"{path} is no valid YAML: byte {error.start + 1} of it is no UTF-8.") from error
    if not isinstance(content, dict | None) or not all(isinstance(key, str) for key in content or ()):
        raise InvalidSettings(f"{path} holds no keys with values, as in 'wait_cap_s: 55'.")
    return content or {}


def _yaml_problem(error: yaml.YAMLError) -> str:
    """The problem with its line number, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return f"line {mark.line + 1}: {', '.join(filter(None, parts))}"


_ERROR_TEXTS = {
    "tuple_type": "a list is needed, as in [/usr/bin/*]",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "string_type": "a text is needed",
    "path_type": "a path is needed",
}
"""Plain texts for pydantic's error types; other errors keep pydantic's text."""


def _problems(error: ValidationError) -> list[str]:
    known = list(Settings.model_fields)
    return [
        f"unknown key {key!r}{nearest(key, known)}. Valid: {', '.join(known)}"
        if problem["type"] == "extra_forbidden"
        else f"{key}: {problem['ctx']['error']}".rstrip(".")
        if problem["type"] == "value_error"
        else f"{key}: {_ERROR_TEXTS.get(problem['type'], problem['msg'])}, not {problem['input']!r}"
        for problem in error.errors()
        if (key := str(problem["loc"][0]))
    ]
