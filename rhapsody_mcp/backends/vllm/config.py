"""Reads the config file (YAML) of the vLLM backend, which describes a model and the hardware for its servers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from rhapsody_mcp.model.errors import InvalidSettings, nearest

__all__ = ["SHIPPED", "Device", "VllmConfig", "read_config", "sample_config"]

SHIPPED = "shipped"
"""The value of `model` that selects the small model of this package."""

Device = Literal["auto", "cpu", "cuda"]
_PositiveInt = Annotated[int, Field(ge=1)]
_OWN_ARGUMENTS = ("--model", "--served-model-name", "--host", "--port", "--api-key", "--tensor-parallel-size", "-tp")


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", defer_build=True, protected_namespaces=(), hide_input_in_errors=True
    )


class Required(_Section):
    """The model. `hf_token` is for models that need a token for their download; `flask_secret_key` is not used."""

    model_name: str | None = None
    hf_token: SecretStr | None = None
    tp_size: _PositiveInt = 1
    flask_secret_key: SecretStr | None = None


class Hardware(_Section):
    """The hardware. There is one server for each `tp_size` of `num_gpus` GPUs; -1 stands for all visible GPUs.

    On several nodes, which an allocation must have, each node gets its share of `num_gpus`.
    """

    num_nodes: int = 1
    num_gpus: Annotated[int, Field(ge=-1)] | None = None
    num_inf_wrkrs_per_cpu: int = -1
    node_offset: int = 0
    inf_wrkr_queue_maxsize: int = -1

    @field_validator("num_nodes")
    @classmethod
    def _some_nodes(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("valid is a number of nodes from 1, or -1 for all nodes of the allocation")
        return value

    @field_validator("num_inf_wrkrs_per_cpu")
    @classmethod
    def _follows(cls, value: int) -> int:
        if value != -1:
            raise ValueError("the number of servers is num_gpus / tp_size; remove this key or set it to -1")
        return value

    @field_validator("node_offset")
    @classmethod
    def _this_node(cls, value: int) -> int:
        if value != 0:
            raise ValueError("the servers run on the node where the backend is; remove this key or set it to 0")
        return value

    @field_validator("inf_wrkr_queue_maxsize")
    @classmethod
    def _unbounded(cls, value: int) -> int:
        if value != -1:
            raise ValueError("tasks wait in the session, which holds any number; remove this key or set it to -1")
        return value


class Llm(_Section):
    """Settings of the server (dtype, max_model_len, gpu_memory_utilization, vllm_log_level), and default parameters for
    the requests of tasks (all others)."""

    dtype: str | None = None
    max_model_len: _PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    vllm_log_level: Literal["debug", "info", "warning", "error"] | None = None
    max_tokens: _PositiveInt | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    system_prompt: str | list[str] | None = None
    padding_side: Literal["left", "right"] = "left"
    truncation_side: Literal["left", "right"] = "left"
    use_async_streaming: bool = False

    @field_validator("vllm_log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("padding_side", "truncation_side")
    @classmethod
    def _nothing_to_do(cls, value: str) -> str:
        if value != "left":
            raise ValueError("vLLM neither pads prompts nor cuts them: one that is too long fails; remove this key")
        return value

    @field_validator("use_async_streaming")
    @classmethod
    def _no_streams(cls, value: bool) -> bool:
        if value:
            raise ValueError("a task has its answer as a whole; stream from the server's own OpenAI API instead")
        return value

    @property
    def request_parameters(self) -> dict[str, Any]:
        """The fields of the server's chat API that this section sets."""
        names = {"max_tokens", "top_k", "top_p", "temperature"}
        names |= {"repetition_penalty", "ignore_eos", "skip_special_tokens"}
        return self.model_dump(include=names, exclude_none=True)

    @property
    def system_text(self) -> str | None:
        return "\n".join(self.system_prompt) if isinstance(self.system_prompt, list) else self.system_prompt


class InputBatching(_Section):
    """Upper bounds for batches. With `toggle_on` false, each prompt is sent as a request of its own."""

    toggle_on: bool = True
    type: Literal["dynamic"] = "dynamic"
    input_batch_wait_seconds: Annotated[float, Field(ge=0)] | None = None
    max_batch_limit: _PositiveInt | None = None


class Guardrails(_Section):
    """A section of other programs: this backend has no prompt guard, and refuses to switch one on."""

    toggle_on: bool = False
    prompt_guard_model: str | None = None
    prompt_guard_sensitivity: float | None = None

    @field_validator("toggle_on")
    @classmethod
    def _off(cls, value: bool) -> bool:
        if value:
            raise ValueError("this backend has no prompt guard; set it to false, and check prompts in a task before")
        return value


class DynamicWorkers(_Section):
    """A section of other programs: this backend's servers run from start to close, and it refuses other settings."""

    toggle_on: bool = False
    min_active_inf_wrkrs_per_cpu: int | None = None
    spin_down_threshold_seconds: float | None = None
    spin_up_threshold_seconds: float | None = None
    spin_up_prompt_threshold: int | None = None

    @field_validator("toggle_on")
    @classmethod
    def _off(cls, value: bool) -> bool:
        if value:
            raise ValueError("this backend's servers run from start to close; set it to false")
        return value


class Server(_Section):
    """The start of the vLLM servers. `model` is the model to load, by default `required.model_name`.

    `python` is the Python of an environment with vLLM, by default the Python of this process.
    """

    model: str | None = None
    served_model_name: str | None = None
    device: Device = "auto"
    python: str | None = None
    environment: dict[str, str] = {}
    extra_args: list[str] = []
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0

    @field_validator("environment", "extra_args", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: _text(item) for name, item in value.items()}
        return [_text(item) for item in value] if isinstance(value, list) else value

    @field_validator("extra_args")
    @classmethod
    def _not_ours(cls, arguments: list[str]) -> list[str]:
        for argument in arguments:
            if (name := argument.partition("=")[0].replace("_", "-")) in _OWN_ARGUMENTS:
                raise ValueError(f"{name} is set by this backend; its own settings are in the other keys")
        return arguments


class VllmConfig(_Section):
    """The whole config file; each section is optional. `run_type` and `token` are for other programs."""

    required: Required = Required()
    hardware: Hardware = Hardware()
    llm: Llm = Llm()
    input_batching: InputBatching = InputBatching()
    guardrails: Guardrails = Guardrails()
    dynamic_inf_wrkr: DynamicWorkers = DynamicWorkers()
    server: Server = Server()
    run_type: str | None = None
    token: SecretStr | None = None

    @property
    def unused(self) -> list[str]:
        """The keys that are set although this backend does not use them."""
        keys = [
            ("flask_secret_key", self.required.flask_secret_key),
            ("run_type", self.run_type),
            ("token", self.token),
        ]
        return [key for key, value in keys if value is not None]


def read_config(file: Path | None, overrides: Mapping[str, Mapping[str, Any]]) -> VllmConfig:
    """Read the settings of `file`. An override (by section and key) replaces a setting where its value is not None.

    Raises InvalidSettings, which names the source, the key and the valid values.
    """
    sections = {} if file is None else _sections(file)
    _checked(sections, f"config_file {file}")
    for section, keys in overrides.items():
        given = {key: value for key, value in keys.items() if value is not None}
        sections[section] = {**sections.get(section, {}), **given}
    return _checked(sections, "the backend's arguments")


def _checked(sections: dict[str, Any], source: str) -> VllmConfig:
    try:
        return VllmConfig.model_validate(sections)
    except ValidationError as error:
        problems = "; ".join(_explained(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors())
        raise InvalidSettings(f"{source}: {problems}.") from None


def _sections(file: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(
            f"config_file {file} cannot be read: {error.strerror}. `rhapsody-mcp init` writes one to start from."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidSettings(f"config_file {file} is no valid YAML: {error}") from error
    if not isinstance(read, dict | None):
        raise InvalidSettings(f"config_file {file} holds no sections; it begins with one, as in 'required:'.")
    return {key: value for key, value in (read or {}).items() if value is not None}


def _explained(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """A validation error in words, without the value, which may be a secret."""
    names = [str(step) for step in location]
    if kind != "extra_forbidden":
        return f"{'.'.join(names)}: {message.removeprefix('Value error, ')}"
    key, section = names[-1], ".".join(names[:-1])
    known = _keys(section) if section else list(VllmConfig.model_fields)
    if homes := [home for home in VllmConfig.model_fields if home != section and key in _keys(home)]:
        hint = f" (it belongs in section {homes[0]!r})"
    else:
        hint = nearest(key, known)
    return f"unknown key {'.'.join(names)!r}{hint}. Valid there: {', '.join(known)}"


def _keys(section: str) -> list[str]:
    kind = VllmConfig.model_fields[section].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_SAMPLE = """\
# Describes the model and the hardware for DragonVllmInferenceBackend(config_file="config.yaml", ...).
# What the program passes to the constructor wins over this file. Unknown keys are refused.

required:
  {model_name}
  # hf_token: hf_...        # only for models that need one to be downloaded
  tp_size: 1                # GPUs that one copy of the model is split over

hardware:
  num_nodes: 1
  {num_gpus}

server:
{server}
  # python: /path/to/environment/bin/python    # where vLLM is installed, if not in this environment
  # environment: {{HF_HUB_OFFLINE: 1}}           # variables for the server
  # extra_args: [--max-num-seqs, 256]          # anything else that vLLM's server takes; paths from the root
  # start_timeout_s: 900

# What a request has where its task says nothing; without a key, the model's own default.
llm:
  # dtype: auto
  # max_model_len: 4096
  # max_tokens: 256
  # temperature: 0.7
  # top_p: 0.95
  # top_k: 50
  # repetition_penalty: 1.1
  # system_prompt: You are a helpful assistant.

# Prompts that wait at the same time go to the server together. These are upper bounds.
input_batching:
  toggle_on: true
  max_batch_limit: 1024
  input_batch_wait_seconds: 0.5
"""

_GPU_SERVER = """\
  model: Qwen/Qwen2.5-0.5B-Instruct    # what is loaded: a folder, or a name on the Hugging Face hub
  device: auto                         # the GPU where there is one; or cpu, or cuda"""

_SHIPPED_SERVER = """\
  # The small model that comes with rhapsody-mcp answers under whatever model_name the program asks for. It runs on
  # the CPU, with neither GPU nor internet, and only ever writes small samples of JSON: enough to try everything out.
  # For real answers, set a folder or a hub name here, and device: auto.
  model: shipped
  device: cpu"""


def sample_config(shipped_model: bool) -> str:
    """A config file with comments, for the model of this package or for a model on a GPU."""
    return _SAMPLE.format(
        model_name="# model_name: Qwen2.5-0.5B-Instruct   # the name that tasks use"
        if shipped_model
        else "model_name: Qwen2.5-0.5B-Instruct    # the name that tasks use",
        num_gpus="num_gpus: 1               # on the CPU: the number of servers"
        if shipped_model
        else "num_gpus: 1               # there is one server for each tp_size of them; -1 for all",
        server=_SHIPPED_SERVER if shipped_model else _GPU_SERVER,
    )
